"""``dashattn``: its commands, their help, and what is said of names that do not exist."""

import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from experiments.arguments import PATH_COMMANDS, parse, parser
from experiments.cli import COMMANDS, main
from experiments.errors import user_errors
from experiments.files import CONFIGS, ROOT
from experiments.help import SCHEMAS, Command, advice, did_you_mean, help_page
from experiments.schema_source import Schema
from tests.shown import assert_as_expected

OF_LM_EVAL = {"harness"}  # whose own help is shown, by a process of its own: a model is registered once in each


def all_schemas() -> set[Schema]:
    """Those of every command and of every choice of its groups, with what lies below them."""
    found: set[Schema] = set()

    def add(schema: Schema) -> None:
        if schema not in found:
            found.add(schema)
            for option in schema.options().values():
                if option.schema is not None:
                    add(option.schema)

    for name in SCHEMAS:
        command = Command(name, ())
        for schema in (command.schema, *(kind for group in command.groups for kind in command.kinds(group))):
            add(schema)
    return found


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # of modules that other tests import
@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - OF_LM_EVAL))
def test_every_command_has_help(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dashattn"])
    with suppress(SystemExit):
        main([name, "--help"])
    page = capsys.readouterr().out
    assert len(page.splitlines()) > 5
    what = COMMANDS[name][0]
    if what not in PATH_COMMANDS and what != "data.collect":
        assert "Options (key=value" in page
    else:
        assert page.startswith(f"usage: dashattn {name} ")


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_all_commands_are_listed_with_what_they_do(arguments, capsys):
    main(arguments)
    page = " ".join(capsys.readouterr().out.split())
    for name, (_, what) in COMMANDS.items():
        assert f" {name} {what} " in page


def test_lm_evals_command_has_its_own_help():
    command = [sys.executable, str(ROOT / "dashattn_command.py"), *OF_LM_EVAL, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Language Model Evaluation Harness" in done.stdout


def test_every_option_is_explained_where_it_is_defined():
    schemas = all_schemas()
    assert {"TrainConfig", "DashConfig", "OracleConfig", "MixedCorpusConfig", "ArmConfig", "Mode"} <= {
        schema.name for schema in schemas
    }
    bare = [
        f"{schema.name}.{option.name}"
        for schema in schemas
        for option in schema.options().values()
        if not option.comment
    ]
    assert bare == []


def test_help_has_values_choices_and_comments():
    page = help_page("train")
    lines = [" ".join(line.split()) for line in page.splitlines()]
    for line in (
        "steps=200",  # of the YAML
        "keep_checkpoints=2",  # of the dataclass
        "optim.lr=0.001",
        "[constant | cosine | wsd] wsd is warm-up, stable, decay; each comes after a linear warm-up.",
        "[at least 2 tokens] tokens per row",
        "attention.alpha=1.5",
        "data.corpora.NAME.weight=1.0",
    ):
        assert line in lines, line
    assert any(line.startswith("[in [1.01, 2.0]] entmax's alpha") for line in lines)  # computed, and of a docstring
    assert "attention=infllmv2|infllmv2_fine" in page
    chosen = help_page("train", ["attention=dash"])
    assert "attention.router_scale=" in chosen
    assert "attention.kernel_size=" not in chosen
    assert "attention.router_scale=4.0" in help_page("train", ["attention=dash_fine"])


def test_whole_pages_of_help(tmp_path, monkeypatch):
    """Every command's own options with their defaults, groups with their choices, and the kinds of a small group; what
    takes paths; all were checked by hand."""
    monkeypatch.setenv("COLUMNS", "120")
    pages = [re.split(r"\n\n(?:model|attention|launcher)=", help_page(name))[0] for name in SCHEMAS]
    pages.append(help_page("train", ["launcher=slurm"]).partition("\n\nlauncher=")[2])
    pages += [parser(module).format_help() for module in PATH_COMMANDS]
    assert_as_expected("\n\n\n".join(pages), Path(__file__).parent / "expected" / "help.txt", tmp_path)


WRONG = (
    ("train", "attentoin=dash"),
    ("train", "attention=dahs"),
    ("train", "model=zzz"),
    ("train", "optim=null"),
    ("train", "launcher=null"),
    ("train", "model.hiden_size=3"),
    ("train", "lr=3"),
    ("train", "heads=3"),
    ("train", "query_heads=3"),
    ("train", "model.rope.theat=3"),
    ("train", "attention.chunk_size=16"),
    ("train", "attention=dash attention.window_size=8"),
    ("train", "launcher.partition=gpu"),
    ("train", "experiment=debgu"),
    ("train", "data=mixture data.corpora.pyton.weight=2"),
    ("train", "data=mixture data.corpora.python.wieght=2"),
    ("evaluate", "run=x attention.chunk_size=16"),
    ("evaluate", "tsks=[loss]"),
    ("sweep", "sweep=fronteir"),
    ("sweep", "sweep=frontier studies.recall.arms.dash-rwa.turned=4"),
    ("scaling", "modes.zreo1.steps=3"),
    ("generate", "promt=x"),
    ("evaluate", "outputs/debug-dash"),
    ("evaluate", "run=x y"),
    ("sweep", "smoke"),
    ("train", "--attention dash"),
    ("evaluate", "run=x tasks=loss,position"),
    ("train", "steps=1e4"),
    ("train", "attention=dash attention.chunk_size=x"),
    ("train", "attention=dash attention.target_sparsity=x"),
    ("train", "attention=dash attention.sparsity_control=null"),
    ("train", "optim.lr=x"),
    ("train", "compile=maybe"),
    ("evaluate", "run=x sparsities=[0.5,x]"),
    ("evaluate", "run=x lengths=[1e3]"),
    ("train", 'attention=dash attention.layers={"*":full}'),
    ("train", "attention=dash attention.layers={0:full,'1':full}"),
    ("plan", "gpus=2 attention=dahs"),
    ("plan", "sweep=fronteir sparsity=0.5"),
    ("plan", "sweep=smoke studies.recall.arms.ful.turned=4 gpu=H100"),
)


def test_advice(tmp_path):
    """What is said of each; the file was checked by hand."""
    said = [f"{command} {overrides}\n    {advice(command, overrides.split())}" for command, overrides in WRONG]
    assert_as_expected("\n".join(said), Path(__file__).parent / "expected" / "advice.txt", tmp_path)


@pytest.mark.parametrize(
    ("command", "overrides"),
    [
        ("train", "steps=3 +x=3 ++y.z=1 ~launcher hydra.run.dir=x hydra/launcher=basic -m"),
        ("train", "attention=dash,full attention.target_sparsity=0.5 seed=0,1"),
        ("train", "attention=dash attention.layers={0-1:full} attention.router_scale=4"),
        ("train", "experiment=continue_pretraining data.corpora.python_doc.weight=2"),  # its data are others
        ("train", "experiment=recall data.pairs_max=4"),
        ("train", "launcher=slurm launcher.sbatch_args.constraint=h100"),
        ("speed", "--config-name speed_shapes nonsense=1"),
        ("sweep", "sweep=smoke jobs=2 studies.recall.arms.full.train=[]"),
        ("train", "--cfg job steps=1_000 seed=1,2 rows_per_micro_batch=null"),
        ("evaluate", "run=x tasks=[loss],[position] lengths=null knobs=${x} rows=${y}"),
        ("evaluate", "run=x sparsities=[0.5,1e-1] any_attention=True any_data=off attention=dash attention.sigma=inf"),
        ("train", "attention=dash attention.layers={*/2:full,1:{name:full}}"),
        ("train", "model.rope.short_factor=[1,2.5] attention=dash attention.target_sparsity=null"),
    ],
)
def test_what_may_be_right_is_left_to_hydra(command, overrides):
    assert advice(command, overrides.split()) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps: [1\n", r"is no YAML \(line 2: expected"),
        (b"# @package _global_\nsteps: 5\n  wrong: indent\n", r"is no YAML \(line 3: mapping values"),
        (b"\xff\xfe\0", r"is no YAML \('utf-8' codec"),
        (b"- a\n", r"holds no keys with values: .*configs/experiment"),
        (b"steps: 5\n", r"must begin with the line # @package _global_"),
        (b"", r"must begin with the line # @package _global_"),
        (b"# @package _global_\nsteps: 5\n", None),
    ],
)
def test_a_file_of_ones_own_is_named_in_a_line(tmp_path, content, message):
    """Hydra ends such a file in a traceback, or in a key that nobody wrote."""
    path = tmp_path / "experiment" / "own.yaml"
    path.parent.mkdir()
    path.write_bytes(content)
    for options in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"], ["-cd", str(tmp_path)]):
        said = advice("train", [*options, "experiment=own", "steps=3"])
        assert message is None if said is None else re.match(f"{re.escape(str(path))} {message}", said)
        assert advice("train", [*options, "experiment=debug"]) is None
        for several in ("+experiment=own", "experiment=debug,own", "experiment=[debug, own]"):
            assert message is None or re.match(f"{re.escape(str(path))} ", advice("train", [*options, several]))


def test_nothing_that_is_committed_gets_advice():
    """Every override that a sweep gives its commands."""
    given = set()
    for file in Path(CONFIGS, "sweep").glob("*.yaml"):
        for study in Command("sweep", [f"sweep={file.stem}"]).values.get("studies", {}).values():
            common = study.get("train", [])
            for arm in study.get("arms", {}).values():
                given.add(("train", *map(str, (*common, *arm.get("train", [])))))
            given.add(("evaluate", *map(str, study.get("evaluate", []))))
            given.add(("train", *map(str, (*common, *(study.get("base") or [])))))
    assert len(given) > 50
    for command, *overrides in given:
        assert advice(command, overrides) is None, (command, overrides)


def test_a_backend_of_another_package_is_none_of_ours(monkeypatch):
    found = type("EntryPoints", (), {"names": {"theirs"}})
    monkeypatch.setattr("experiments.help.entry_points", lambda group: found)
    assert advice("train", ["attention=theirs", "attention.anything=1"]) is None
    assert advice("train", ["model=theirs"]).startswith("model=theirs does not exist")
    assert "attention: full, checkpoint, dash" in (page := help_page("train"))
    assert re.search(r"attention: .*, theirs$", page, re.MULTILINE)
    assert not re.search(r"model: .*, theirs$", page, re.MULTILINE)


def test_a_command_that_does_not_exist(capsys):
    with pytest.raises(SystemExit):
        main(["trian"])
    assert "dashattn trian does not exist: did you mean train?" in capsys.readouterr().err
    main([])
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert did_you_mean("nothing like it", COMMANDS) == ""


def test_paths_are_asked_for_in_one_line(capsys):
    with pytest.raises(SystemExit), user_errors():
        parse("experiments.sweep.collect", ["outputs/smoke"])
    assert "the following arguments are required: target; usage: python -m" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="the following arguments are required: target; usage: dashattn collect "):
        main(["collect", "outputs/smoke"])
    with pytest.raises(SystemExit, match=r"argument output_dir: ~nobody-here/a: no such home is known; give the path"):
        main(["status", "~nobody-here/a"])


def test_help_comes_fast_from_anywhere_and_wrong_names_end_in_one_line(tmp_path):
    """As the console script starts it, in another folder; before PyTorch is imported."""

    def start(*arguments):
        command = [sys.executable, "-X", "importtime", str(ROOT / "dashattn_command.py"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
        assert not imported & {"torch", "hydra", "omegaconf", "numpy"}
        said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        return done.returncode, done.stdout, said

    code, page, _ = start("evaluate", "--help")
    assert code == 0
    assert "tasks=[loss]" in page
    code, _, said = start("train", "attention=dahs")
    assert (code, said) == (1, ["error: attention=dahs does not exist: did you mean dash?"])


def test_help_may_be_read_in_part():
    command = f"set -o pipefail; {sys.executable} {ROOT}/dashattn_command.py train --help | read line"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_configurations_name_their_schemas():
    """``SCHEMAS`` are those that configs/NAME.yaml begin with."""
    for name, schema in SCHEMAS.items():
        first = yaml.safe_load(Path(CONFIGS, f"{name}.yaml").read_text())["defaults"][0]
        source = (ROOT / schema.module.replace(".", "/")).with_suffix(".py").read_text()
        assert f'store(name="{first}", node={schema.name})' in source
