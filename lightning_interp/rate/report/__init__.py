"""Studies: numbers, tables and figures of one attribute and one reward."""
