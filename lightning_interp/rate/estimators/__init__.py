"""Effects of an attribute on a reward, with intervals, from complete units."""
