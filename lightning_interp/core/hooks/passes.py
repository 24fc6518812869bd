"""What is asked of the forward passes of an attached model: each module is called, and by one thread at a time."""

from __future__ import annotations

import threading
import weakref

from lightning_interp.core.model.model_map import ModelMap
from lightning_interp.core.model.own_hooks import Hook
from lightning_interp.core.tokens.step import StepContext
from lightning_interp.errors import IncompatibleModelError, UnsupportedStrategyError

__all__ = ["OneThread", "PassWatch", "other_thread"]


def other_thread(does: str) -> UnsupportedStrategyError:
    """The error of a thread that finds another one at work."""
    return UnsupportedStrategyError(
        f"Another thread {does} through what is attached to this model. Let one thread at a time use it (a lock around "
        "each forward pass or generate), or attach to a copy of the model in each."
    )


class PassWatch:
    """Hooks of modules that a whole pass must call: the first pass of each kind tells, the others cost nothing."""

    def __init__(self, model_map: ModelMap) -> None:
        self.model_map = model_map
        self.hooks: dict[bool, list[tuple[Hook, str]]] = {False: [], True: []}  # by whether outside of the backbone
        self.seen: set[tuple[bool, bool]] = set()
        self.due: set[bool] = set()

    def add(self, hook: Hook, path: str) -> bool:
        """Watch a hook; True if it is the first one outside of the backbone."""
        backbone = self.model_map.backbone_path
        outside = bool(backbone) and not f"{path}.".startswith(f"{backbone}.")
        self.hooks[outside].append((hook, path))
        return outside and len(self.hooks[True]) == 1

    def begin(self, kind: tuple[bool, bool]) -> None:
        """A pass begins: of one token or more, in training or not."""
        if kind in self.seen or not self._calls_all():
            return
        self.seen.add(kind)
        self.due = {outside for outside, hooks in self.hooks.items() if hooks}
        for hook, _ in (*self.hooks[False], *self.hooks[True]):
            hook.fired = False

    def _calls_all(self) -> bool:
        """Whether no block is left out on purpose, as by LayerDrop and by early exits."""
        dropped = self.model_map.model.training and self.model_map.config_value("layerdrop", 0.0)
        depth = self.model_map.config_value("num_hidden_layers", len(self.model_map))
        return not dropped and depth in (None, len(self.model_map))

    def check(self, *, outside: bool = False) -> None:
        """A pass is over, of the backbone or of all: refuse it if a module was never called."""
        if outside not in self.due:
            return
        self.due.discard(outside)
        lost = [path for hook, path in self.hooks[outside] if not hook.fired]
        if lost:
            named = ", ".join(dict.fromkeys(lost[:4])) + (", ..." if len(lost) > 4 else "")
            raise IncompatibleModelError(
                f"{named} of {type(self.model_map.model).__name__} should have acted in this pass, but was never "
                "called: a fused block or kernel works out what it does from its weights (or inputs_embeds pass an "
                "embedding by), so nothing was changed there. Use the model without such kernels, pass input_ids, or "
                "choose sites and components that it calls."
            )


class OneThread:
    """Passes of one attachment come from one thread at a time, for what is known of a pass is kept beside the hooks."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: threading.Thread | None = None
        self.running = False
        self.interrupted: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

    def enter(self, step: StepContext) -> None:
        """Refuse a pass beside that of another thread, and one that goes on after another thread's prompt."""
        me = threading.current_thread()
        with self.lock:
            beside = self.running and self.owner is not me
            if beside or (step.past > 0 and me in self.interrupted):
                raise other_thread("is running a pass" if beside else "has begun a text of its own")
            if step.past == 0:
                self.interrupted.discard(me)
                if self.owner is not None and self.owner is not me:
                    self.interrupted.add(self.owner)
            self.owner, self.running = me, True
