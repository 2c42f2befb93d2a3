"""Training in 8-bit floats: what stands in its way is said in one sentence, and the model is told of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from anarcho_cli.back_ends import back_end
from anarcho_cli.back_ends.run_model import RunModel
from anarcho_cli.config import RunConfig, resolve
from anarcho_cli.resume_changes import Verdict, verdict_of


def config(*settings: str) -> RunConfig:
    return resolve(preset="reference-137m", overrides=["train.float8=true", *settings])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["train.precision=float16"],
            r"train\.float8 is true and train\.precision is 'float16'; expected 'bfloat16' or 'auto'",
        ),
        (["train.compile=off"], r"train\.float8 is true and train\.compile is 'off'; expected 'on' or 'auto'"),
        (["lora.rank=4"], r"train\.float8 is true and lora\.rank is 4; .* expected one of them"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(settings: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        config(*settings)


def test_devices_frameworks_and_shapes_without_it_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(
        ValueError,
        match=r"train\.float8 is true, but the device is cpu; expected an NVIDIA GPU \(--device cuda\), or false",
    ):
        back_end("torch").require_supported(config(), "cpu")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("anarcho_model.layers.torch_cuda.AVAILABLE", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"this GPU has compute capability 8\.0; expected 8\.9 or later, or false"):
        back_end("torch").require_supported(config(), "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    back_end("torch").require_supported(config(), "cuda")
    with pytest.raises(ValueError, match=r"model\.hidden_dim is 3000; expected a multiple of 16, or false"):
        back_end("torch").require_supported(config("model.hidden_dim=3000"), "cuda")


def test_mlx_refuses_it() -> None:
    pytest.importorskip("mlx.core")
    with pytest.raises(ValueError, match=r"train\.float8 is true, which MLX does not have; expected false"):
        back_end("mlx").require_supported(config(), "cpu")


def test_a_run_ends_with_one_sentence_before_it_begins(tmp_path: Path, anarcho) -> None:
    (tmp_path / "text.txt").write_text("The whale and the sea. " * 400)
    place = ("--data", tmp_path / "text.txt", "--runs-dir", tmp_path / "runs", "--name", "run")
    result = anarcho("pretrain", "--device", "cpu", *place, "--set", "train.float8=true", "--set", "train.compile=on")
    assert result.exit_code == 2, result.output
    assert "train.float8 is true, but the device is cpu" in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_the_model_is_told(tmp_path: Path) -> None:
    class Model:
        def init_weights(self, **_options: object) -> None:
            pass

    for given in (False, True):
        model = Model()
        chosen = config(f"train.float8={str(given).lower()}")
        RunModel(config=chosen, tokenizer=None, base=tmp_path / "none", weights=None, lora=None, peft=None).prepare(
            model
        )  # type: ignore[arg-type]
        assert getattr(model, "float8", False) == given


def test_a_resumed_run_may_change_it_if_that_is_asked_for() -> None:
    assert verdict_of("train", "float8", config()) == Verdict.flag
