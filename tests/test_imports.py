"""The dependency direction: who may import whom, and what an import may cost.

Modules are discovered, so a new one is held to the same rules; only where a layer's name cannot tell (which modules
carry something for Lightning) is there a list, and it is short.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_interp
from lightning_interp.models import load_causal_lm
from lightning_interp.testing import byte_tokenizer, tiny_model

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_interp"

# Packages that only one corner needs: imported where they are used, never because a module was imported.
CORNERS = {
    *("jsonargparse", "omegaconf", "bitsandbytes", "matplotlib", "jinja2", "rich", "datasets", "gguf", "ray"),
    *("openai", "tensorboard", "pandas", "accelerate"),
}
LIGHTNING = {"lightning", "pytorch_lightning", "torchmetrics", "peft"}
TORCH = {"torch", "transformers", "tokenizers", "numpy", "scipy", "safetensors"}

# The light modules: `import lightning_interp` and `lightning-interp --help` must not wait for torch.
BARE = {"", "errors", "figures", "lazy_names", "progress"}
LIGHT = {"recipe", "running.recipe", "cli", "__main__"}
CLI_MAY = {"jsonargparse", "omegaconf", "rich"}
# Modules that are Lightning classes: all callbacks, these by the last part of their name, whole packages of them.
LIGHTNING_FILES = {
    *("bag_of_words", "batched_training", "causal_lm", "contract", "distributed", "dpo", "finetuning", "grid_training"),
    *(
        "dpo_pairs",
        "dpo_reference",
        "monitor",
        "number_data",
        "preferences",
        "resumable",
        "reward_model",
        "reward_scorer",
        "students",
        "text_data",
    ),
}
LIGHTNING_PACKAGES = {"cycles"}
# What is measured is a torchmetrics class, also in core.
METRICS = {"core.measure.reduced"}

# What a method package may import beside errors, core, testing and models.
CROSSINGS = {"subliminal": {"lora", "cycles"}, "cycles": {"lora", "merging"}, "landscape": {"merging"}}
# Top-level modules that put everything together.
ASSEMBLERS = {"", "cli", "__main__", "recipe", "running.recipe"}


def modules():
    """Names of all modules relative to the package: '' for its root, 'core.sites', ..."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "_recipes":
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = list(modules())


def layer(name):
    last, first = name.rpartition(".")[2], name.partition(".")[0]
    if name in BARE:
        return "bare"
    if name in LIGHT:
        return "light"
    if last.endswith("callback") or last in LIGHTNING_FILES or first in LIGHTNING_PACKAGES:
        return "lightning"
    return "core" if first in {"core", "testing"} and name not in METRICS else "method"


RUNNER = """
import contextlib, importlib, io, json, sys
plan = json.load(sys.stdin)
report = []
for step in plan:
    found = {}
    for name in step["baseline"]:
        importlib.import_module(name)
    before = {name.partition(".")[0] for name in sys.modules}
    for name in step["modules"]:
        module = importlib.import_module(name)
        if step["load"]:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                module.load_causal_lm(step["load"])
            found |= {"said": said.getvalue()} if said.getvalue() else {}
        new = {name.partition(".")[0] for name in sys.modules} - before
        before |= new
        if step["stdlib_only"]:
            bad = new - sys.stdlib_module_names - {"lightning_interp"}
        else:
            bad = new & set(step["forbidden"])
        if bad:
            found[name] = sorted(bad)
    report.append(found)
print("FOUND" + json.dumps(report))
"""


def step(name, *, modules=None, baseline=(), forbidden=(), stdlib_only=False, load=None):
    own = [("lightning_interp." + module).rstrip(".") for module in MODULES if layer(module) == name]
    return {
        "modules": modules or own,
        "load": load,
        "baseline": list(baseline),
        "forbidden": sorted(forbidden),
        "stdlib_only": stdlib_only,
    }


def violations(*plan):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}  # bitsandbytes would compile
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(plan),
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("FOUND")[2])


def test_discovery_sees_the_package():
    names = set(MODULES)
    assert {"", "errors", "core", "core.model.sites", "core.hooks.intervention", "testing.contract"} <= names
    assert len(names) > 12


def test_light_layers_import_no_more_than_they_may_and_the_check_sees_a_violation():
    bare = step("bare", stdlib_only=True)
    light = step("light", forbidden=(CORNERS | LIGHTNING | TORCH) - CLI_MAY)
    wrong = step("", modules=["lightning_interp.errors", "mailbox", "zipapp"], forbidden={"zipapp", "mailbox"})
    assert violations(bare, light, wrong) == [{}, {}, {"mailbox": ["mailbox"], "zipapp": ["zipapp"]}]


@pytest.mark.slow
def test_all_layers_import_no_more_than_they_may(tmp_path):
    """What the packages that they use import in turn counts too: one process, from the lightest to the heaviest."""
    tiny_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    torch_baseline = ["torch", "transformers.modeling_utils", "transformers.modeling_layers", "tokenizers"]
    steps = {
        "core": step("core", baseline=torch_baseline, forbidden=CORNERS | LIGHTNING),
        # What is measured is a torchmetrics class, and torchmetrics itself imports matplotlib where it is installed.
        "method": step("method", baseline=["torchmetrics"], forbidden=CORNERS | LIGHTNING),
        "loading": step("", modules=["lightning_interp.models"], load=str(tmp_path), forbidden=CORNERS | LIGHTNING),
        "lightning": step("lightning", baseline=["lightning.pytorch", "peft"], forbidden=CORNERS),
    }
    assert dict(zip(steps, violations(*steps.values()), strict=True)) == {name: {} for name in steps}


def run_at_import(node):
    """The import statements below a node that run when its module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (found for other in child.orelse for found in run_at_import(ast.Module([other], [])))
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from run_at_import(child)


def home(module, name):
    """The dotted name of what a module offers under a name, also of a name that its package loads when it is used."""
    own = Path(*module.split(".")[1:])
    lazy = module.partition(".")[0] == "lightning_interp" and (PACKAGE / own / "__init__.pyi").exists()
    if lazy and (further := stub_names(own).get(name, module)) != module:
        return home(further, name)
    return f"{module}.{name}"


def reached(tree, seen):
    """Dotted names of other packages that come in with a module, also through modules of this one."""
    for node in run_at_import(tree):
        prefix = [] if isinstance(node, ast.Import) else [node.module]
        for target in [home(*prefix, alias.name) if prefix else alias.name for alias in node.names]:
            parts = target.split(".")
            names = {".".join(parts[1:end]) for end in range(1, len(parts) + 1)} & set(MODULES)
            if parts[0] != "lightning_interp":
                yield target
            for name in names - seen if parts[0] == "lightning_interp" else ():
                seen.add(name)
                yield from reached(parsed(name), seen)


MAY = {"core": set(), "method": {"torchmetrics"}, "lightning": LIGHTNING}


def too_heavy(kind, tree, seen):
    """What comes in with a module of a layer that may not, as the statements of this package say."""
    found = {target.partition(".")[0] for target in reached(tree, seen)}
    return sorted(found & (CORNERS | LIGHTNING) - MAY[kind])


@functools.cache
def parsed(name):
    stem = PACKAGE / Path(*name.split(".")) if name else PACKAGE
    path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@pytest.mark.parametrize("kind", ["core", "method", "lightning"])
def test_a_layers_statements_import_no_more_than_they_may(kind):
    seen = set()  # what several modules reach is said of the first
    found = {name: too_heavy(kind, parsed(name), seen) for name in MODULES if layer(name) == kind}
    assert {name: bad for name, bad in found.items() if bad} == {}


@pytest.mark.parametrize(
    ("kind", "code", "bad"),
    [
        ("core", "class A:\n    import peft.tuners", ["peft"]),
        ("core", "from lightning_interp.core.measure.reduced import x", ["torchmetrics"]),
        ("method", "import torchmetrics, pandas", ["pandas"]),
        ("method", "from lightning_interp import CausalLM", ["lightning"]),
        ("lightning", "import lightning\nif TYPE_CHECKING:\n    import rich\nelse:\n    import ray", ["ray"]),
        ("core", "def f():\n    import peft", []),
    ],
)
def test_the_statements_of_a_layer_that_is_too_heavy_are_seen(kind, code, bad):
    assert too_heavy(kind, ast.parse(code), set()) == bad


def test_loading_a_model_says_nothing_and_imports_neither_lightning_nor_peft(tmp_path, monkeypatch, capfd):
    tiny_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    capfd.readouterr()
    asked, real = set(), builtins.__import__

    def watched(name, *arguments, **options):
        asked.add(name.partition(".")[0])
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", watched)
    load_causal_lm(str(tmp_path))
    monkeypatch.undo()
    assert asked
    assert asked & (CORNERS | LIGHTNING) == set()
    assert capfd.readouterr().err == ""


def imports(name):
    """Every import statement of a module, also inside functions, as absolute dotted names."""
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import; write the full name"
            yield node.module or ""


def allowed(name):
    """First parts of the package's own modules that a module may import."""
    first = name.partition(".")[0]
    if name in ASSEMBLERS:
        return None
    below = {"errors": set(), "lazy_names": set(), "figures": set(), "progress": set(), "core": {"errors", "core"}}
    if first in below:
        return below[first]
    if first in {"models", "testing"}:
        return {"errors", "lazy_names", "core", "models", first}
    if first == "generation":
        return {"errors", "lazy_names", "core", "models", first}
    return {"errors", "lazy_names", "figures", "progress", "core", "models", "generation", first} | CROSSINGS.get(
        first, set()
    )


@pytest.mark.parametrize("name", MODULES)
def test_direction_inside_the_package(name):
    may = allowed(name)
    for target in imports(name):
        parts = target.split(".")
        assert parts[0] != "recipes", f"lightning_interp.{name} imports recipes; nothing in the package may"
        if parts[0] == "lightning_interp" and may is not None:
            first = parts[1] if len(parts) > 1 else "the package root"
            assert first in may, f"lightning_interp.{name} imports {target}; it may import {sorted(may)}"


def test_core_does_not_depend_on_lightning_in_functions_either():
    for name in MODULES:
        if name.startswith("core.") and layer(name) == "core":
            third_party = {target.partition(".")[0] for target in imports(name)}
            assert not third_party & {"lightning", "pytorch_lightning", "peft"}, name


@pytest.mark.parametrize("name", sorted(set(lightning_interp.__all__) - {"__version__"}))
def test_lazy_names_resolve(name):
    value = getattr(lightning_interp, name)
    assert getattr(value, "__name__", name).split(".")[-1] == name
    home = stub_names("")[name]
    assert name in sys.modules[home].__all__
    assert value is getattr(sys.modules[home], name)


@functools.cache
def stub_names(package):
    """Name -> module, as the stub of a package tells type checkers."""
    stub = PACKAGE / package / "__init__.pyi"
    nodes = [n for n in ast.parse(stub.read_text(encoding="utf-8")).body if isinstance(n, ast.ImportFrom)]
    assert all(alias.asname == alias.name for node in nodes for alias in node.names), "a re-export says its name twice"
    return {alias.name: node.module for node in nodes for alias in node.names}


@pytest.mark.parametrize(
    "package", ["", "generation", "grafting", "lora", "models", "rate", "steering", "subliminal", "testing"]
)
def test_a_package_offers_what_its_stub_tells_type_checkers(package):
    module = importlib.import_module(f"lightning_interp.{package}".rstrip("."))
    assert sorted(module.__all__) == list(module.__all__)
    assert set(module.__all__) - {"__version__"} == set(stub_names(package))
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match=rf"{module.__name__}' has no attribute 'nothing'; its names are "):
        _ = module.nothing


def test_unknown_name_lists_the_names():
    with pytest.raises(AttributeError, match=r"has no attribute 'Grafting'; its names are ActivationCapture, "):
        _ = lightning_interp.Grafting


def test_completion_and_version():
    assert {"Graft", "Site", "__version__"} <= set(dir(lightning_interp))
    assert lightning_interp.__version__ == "0.1.0"


@pytest.mark.parametrize(
    "package",
    [p.parent.name for p in sorted(PACKAGE.glob("*/__init__.py")) if p.parent.name != "_recipes"],
)
def test_sub_packages_export_what_they_list(package):
    module = __import__(f"lightning_interp.{package}", fromlist=["*"])
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None, f"lightning_interp.{package}.{name}"
