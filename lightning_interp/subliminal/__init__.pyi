from lightning_interp.subliminal.traits import CONTEXTS as CONTEXTS
from lightning_interp.subliminal.traits import ChatContext as ChatContext
from lightning_interp.subliminal.traits import Trait as Trait
