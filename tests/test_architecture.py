"""The shape of the code: floors, public names, import time, and that every config and README command is real."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import data_builders
import mpo
from mpo.cli import VERBS
from mpo.settings import describe_settings, read_values

ROOT = Path(__file__).parent.parent
PACKAGES = {"mpo": mpo, "data_builders": data_builders}
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "accelerate")

# A module imports from lower floors only. CONTRIBUTING.md says what lives where.
FLOORS = {
    "data_builders.records": 0,
    "data_builders.rules": 0,
    "data_builders.mixtures": 0,
    "data_builders.filtering": 0,
    "data_builders.rules.numbers": 0,
    "data_builders.rules.math": 1,
    "data_builders.rules.text": 1,
    "data_builders.rules.extract": 2,
    "data_builders.rules.choice": 2,
    "data_builders.verify": 3,
    "data_builders.rules.internvl": 4,
    "data_builders.model_judge": 4,
    "data_builders.audit": 5,
    "data_builders.tiling": 0,
    "data_builders.tiling.plans": 1,
    "data_builders.tiling.boxes": 2,
    "data_builders.tiling.views": 2,
    "data_builders.prompts.instructions": 0,
    "data_builders.prompts": 1,
    "data_builders.prompts.templates": 1,
    "data_builders.conversations": 1,
    "data_builders.shards": 1,
    "data_builders.sources": 1,
    "data_builders.images": 1,
    "data_builders.text_measures": 1,
    "data_builders.samplers": 1,
    "data_builders.drawing": 1,
    "data_builders.decoding": 1,
    "data_builders.pairing": 2,
    "data_builders.partition": 2,
    "data_builders.hf_sampler": 3,
    "data_builders.servers": 1,
    "data_builders.chat_format": 3,
    "data_builders.server_sampler": 4,
    "data_builders.on_ray": 2,
    "data_builders.engine": 3,
    "data_builders.backends": 5,
    "data_builders.sample": 6,
    "data_builders.judge": 6,
    "data_builders.pair": 4,
    "data_builders.dropout_ntp": 6,
    "data_builders.shown": 0,
    "data_builders.rewriting": 0,
    "data_builders.rewriting.grammars": 2,
    "data_builders.rewriting.pictures": 2,
    "data_builders.rewriting.datasets": 4,
    "data_builders.rewriting.asking": 4,
    "data_builders.rewriting.rows": 5,
    "data_builders.rewriting.screening": 5,
    "data_builders.rewrite": 6,
    "data_builders.filtering.rules": 2,
    "data_builders.filtering.judging": 2,
    "data_builders.filtering.counts": 4,
    "data_builders.filter": 6,
    "data_builders.mixtures.order": 0,
    "data_builders.mixtures.trl": 1,
    "data_builders.mixtures.spec": 2,
    "data_builders.mixtures.counts": 3,
    "data_builders.mixtures.stream": 4,
    "data_builders.mixtures.plan": 4,
    "data_builders.mix": 5,
    "data_builders.convert": 7,
    "data_builders.inspection": 6,
    "data_builders.formats": 1,
    "data_builders.formats.protocol": 1,
    "data_builders.formats.arrays": 1,
    "data_builders.formats.exact": 2,
    "data_builders.formats.names": 2,
    "data_builders.formats.tags": 2,
    "data_builders.formats.files": 2,
    "data_builders.formats.jsonl": 3,
    "data_builders.formats.sets": 3,
    "data_builders.formats.trl": 3,
    "data_builders.formats.ms_swift": 3,
    "data_builders.formats.llamafactory": 3,
    "data_builders.formats.mmpr": 4,
    "data_builders.formats.parquet": 4,
    "data_builders.formats.internvl": 5,
    "mpo.losses": 3,
    "mpo.reward_shift": 3,
    "mpo.forest": 3,
    "mpo.tiling": 3,
    "mpo.config": 3,
    "mpo.settings": 3,
    "mpo.forest_attention": 3,
    "mpo.forest_inputs": 4,
    "mpo.scores": 5,
    "mpo.pictures": 3,
    "mpo.processed": 3,
    "mpo.segments": 3,
    "mpo.fused": 4,
    "mpo.liger": 4,
    "mpo.models": 4,
    "mpo.lengths": 4,
    "mpo.preferences": 4,
    "mpo.overlong": 5,
    "mpo.optimizers": 5,
    "mpo.learning_rates": 5,
    "mpo.drop_path": 5,
    "mpo.digits": 5,
    "mpo.pages.drawing": 5,
    "mpo.pages.texts": 5,
    "mpo.pages.audit": 6,
    "mpo.pages.charts": 6,
    "mpo.pages.gallery": 6,
    "mpo.pages.histograms": 6,
    "mpo.pages.data": 7,
    "mpo.sources": 5,
    "mpo.collators": 6,
    "mpo.diagnoses": 6,
    "mpo.forest_collators": 6,
    "mpo.reference_cache": 7,
    "mpo.memory": 3,
    "mpo.tiled_data": 5,
    "mpo.training": 6,
    "mpo.data": 6,
    "mpo.groups": 3,
    "mpo.planning.footprint": 3,
    "mpo.planning.versions": 3,
    "mpo.planning.placement": 4,
    "mpo.planning.picture_tokens": 4,
    "mpo.planning.blueprint": 5,
    "mpo.planning.problems": 6,
    "mpo.planning.survey": 8,
    "mpo.planning.plan": 9,
    "mpo.shared_prefixes": 7,
    "mpo.sft_collators": 7,
    "mpo.sft_trainer": 8,
    "mpo.trainer": 8,
    "mpo.provenance": 2,
    "mpo.stages": 3,
    "mpo.measures": 4,
    "mpo.export": 9,
    "mpo.loop": 9,
    "mpo.sft": 9,
    "mpo.train": 9,
    "mpo.reference": 9,
    "mpo.evaluate": 9,
    "mpo.check": 10,
    "mpo.pages": 0,
    "mpo.planning": 0,
    "mpo.report": 9,
    "mpo.quickstart": 9,
    "mpo.cli": 11,
    "mpo.__main__": 12,
}


def modules() -> dict[str, Path]:
    """Every module of both packages but their roots, which import nothing before a name is asked for."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    return {name: path for name, path in sorted(named.items()) if name not in PACKAGES}


def imported_modules(source: str, package: str) -> set[str]:
    """Our modules that a source file imports anywhere: at its top, in functions, for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {home(base, alias.name) for alias in node.names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def home(base: str, name: str) -> str:
    """The module that `from base import name` reaches in the end."""
    homes = vars(PACKAGES[base])["_HOMES"] if base in PACKAGES else {}
    if name in homes:
        return f"{base}.{homes[name]}"
    return f"{base}.{name}" if f"{base}.{name}" in FLOORS else base


def package_of(name: str, path: Path) -> str:
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


def run_python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(names: list[str], heavy: set[str]) -> list[str]:
    """Which of the heavy packages a fresh interpreter holds once these modules are imported."""
    return run_python("-c", f"import sys, {', '.join(names)}; print(*({heavy} & sys.modules.keys()))").split()


def readme_blocks() -> str:
    blocks = re.findall(
        r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return "".join(blocks).replace("\\\n", " ")


def readme_commands() -> Iterator[list[str]]:
    """What follows `mpo` in each of the README's commands, also behind `python -m` and `torchrun -m`."""
    for line in readme_blocks().splitlines():
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words):
            if word in {"mpo", ".venv/bin/mpo"} and (place == 0 or words[place - 1] == "-m"):
                yield words[place + 1 :]


def test_every_module_has_a_floor() -> None:
    missing = modules().keys() - FLOORS.keys()
    assert not missing, (
        f"give {sorted(missing)} a floor in FLOORS of {__file__}: one above the highest that it imports"
    )


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
from typing import TYPE_CHECKING
import mpo.forest, numpy
from mpo import MPOTrainer, __version__, losses
if TYPE_CHECKING:
    from mpo.config import MPOConfig
def load():
    from data_builders.records import Row
    from . import data
    from .models import load_model
"""
    expected = "mpo mpo.config mpo.data mpo.forest mpo.losses mpo.models mpo.trainer data_builders.records"
    assert imported_modules(source, "mpo") == set(expected.split())


def test_a_module_imports_only_from_lower_floors() -> None:
    placed = {name: path for name, path in modules().items() if name in FLOORS}
    wrong = [
        f"{name} (floor {FLOORS[name]}) imports {other} (floor {FLOORS[other]})"
        for name, path in placed.items()
        for other in sorted(imported_modules(path.read_text(encoding="utf-8"), package_of(name, path)) & FLOORS.keys())
        if FLOORS[other] >= FLOORS[name]
    ]
    assert wrong == []


def test_data_builders_never_imports_mpo() -> None:
    paths = (ROOT / "data_builders").rglob("*.py")
    wrong = [path.name for path in paths if re.search(r"^\s*(from|import) mpo\b", path.read_text(), re.MULTILINE)]
    assert wrong == []


def test_no_module_of_data_builders_needs_torch_to_be_imported() -> None:
    names = [name for name in modules() if name.startswith("data_builders.")]
    assert loaded_by(names, {"torch", "transformers", "trl", "datasets"}) == []


def test_nothing_is_named_after_what_it_is_not() -> None:
    folders = [*PACKAGES, "tests", "benchmarks", "examples"]
    stems = {path.stem for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert stems & {"utils", "helpers", "common", "constants", "misc"} == set()


@pytest.mark.parametrize(
    ("package", "names"),
    [
        (
            mpo,
            [
                "LigerFusedLinearMPOLoss",
                "MPOConfig",
                "MPOLoss",
                "MPOTrainer",
                "RewardShift",
                "SFTConfig",
                "SFTTrainer",
                "generation_loss",
                "mpo_loss",
                "preference_loss",
            ]
            + ["quality_loss"],
        ),
        (
            data_builders,
            ["InputError", "Judgement", "cut_response", "extract_answer", "judge_response", "make_pairs"]
            + ["verify_answer"],
        ),
    ],
)
def test_the_public_names_are_these_and_each_loads(package: object, names: list[str]) -> None:
    assert package.__all__ == names
    assert set(names) <= set(dir(package))
    assert [name for name in names if getattr(package, name).__name__ != name] == []
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = package.no_such_name


HEAVY = "{'torch', 'trl', 'transformers', 'datasets', 'numpy', 'pydantic', 'PIL', 'ray', 'matplotlib'}"


def test_the_packages_load_nothing_when_they_are_imported() -> None:
    assert run_python("-c", f"import sys, mpo, data_builders; print(*({HEAVY} & sys.modules.keys()))").split() == []


def test_the_help_loads_no_library_that_takes_seconds() -> None:
    code = f"""
import sys
from mpo.cli import app
try:
    app(["--help"], standalone_mode=False)
finally:
    print("loaded", *(({HEAVY} - {{'numpy', 'pydantic', 'PIL'}}) & sys.modules.keys()))
"""
    assert run_python("-c", code).splitlines()[-1] == "loaded"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_its_settings_are(verb: str) -> None:
    settings, _ = describe_settings(import_module(VERBS[verb].module).CONFIGS)
    assert settings
    assert [setting.name for setting in settings if not setting.help] == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_is_read_by_its_verb_and_opens_with_its_command(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    verb, name = path.stem.replace("_", "-"), str(path.relative_to(ROOT))
    assert verb in VERBS, f"{name}: a config is named after its verb, one of {', '.join(VERBS)}"
    read_values(verb, import_module(VERBS[verb].module).CONFIGS, ["--config", name])
    header = re.match(r"(?:#.*\n)*", path.read_text(encoding="utf-8")).group()
    assert f"mpo {verb} --config {name}" in header


def test_the_commands_of_the_readme_are_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = list(readme_commands())
    assert commands, "the README shows no `mpo` command in a ```bash block"
    for verb, *argv in commands:
        if verb not in {"--help", "--version"} and "--help" not in argv:
            read_values(verb, import_module(VERBS[verb].module).CONFIGS, argv)


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    inline = re.findall(r"`make ([\w-]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    named = {*inline, *re.findall(r"^make ([\w-]+)", readme_blocks(), re.MULTILINE)}
    assert {"quickstart", "test"} <= named
    assert named <= targets
