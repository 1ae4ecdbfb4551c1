"""The toy transformer: training that stops and goes on, its commands, sampling."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch.checkpoint import save_checkpoint
from project.transformer import cli, data, memory, sampling, training
from project.transformer import model as models
from project.transformer.compare import measure
from project.transformer.errors import UserError
from project.transformer.options import RunOptions
from project.transformer.run_files import RunFolder, load_snapshot

SCRIPT = Path(__file__).resolve().parent.parent / "project" / "run_transformer.py"
SENTENCE = "the quick brown fox jumps over the lazy dog, again and again. "
TINY: dict[str, Any] = {
    "layers": 1,
    "d_model": 16,
    "heads": 2,
    "d_middle": 24,
    "context": 8,
    "batch": 4,
    "steps": 12,
    "warmup": 3,
    "eval_every": 5,
    "save_every": 4,
}


@pytest.fixture(autouse=True)
def restore_default_dtype() -> Iterator[None]:
    before = minitorch.get_default_dtype()
    yield
    minitorch.set_default_dtype(before)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 20, encoding="utf-8")
    return path


def tiny(text: Path, **changes: Any) -> RunOptions:
    return RunOptions().replaced({**TINY, "data": str(text), **changes})


def arguments(values: dict[str, Any]) -> list[str]:
    return [word for k, v in values.items() for word in (f"--{k.replace('_', '-')}", str(v))]


class Silent:
    """A reporter that keeps the losses, and may press Ctrl-C after a step."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.losses: list[float] = []
        self.valid: list[float] = []
        self.interrupt_after = interrupt_after

    def stepped(self, step: int, loss: float, tokens_per_second: float) -> None:
        self.losses.append(loss)
        if step == self.interrupt_after:
            signal.raise_signal(signal.SIGINT)

    def evaluated(self, step: int, loss: float, valid_loss: float) -> None:
        self.valid.append(valid_loss)


# ----- training -----


@pytest.mark.parametrize("attention", ["flash", "standard"])
def test_a_resumed_run_gives_the_same_losses_bit_for_bit(
    text: Path, tmp_path: Path, attention: str
) -> None:
    """Dropout is on, so that the generators' state matters too."""
    options = tiny(text, dropout=0.1, attention=attention)
    corpus = data.load(options.data, options.model.context)
    whole = Silent()
    assert training.train(training.Trainer(options, corpus), RunFolder(str(tmp_path / "a")), whole)

    folder = RunFolder(str(tmp_path / "b"))
    first, second = Silent(interrupt_after=6), Silent()
    assert not training.train(training.Trainer(options, corpus), folder, first)
    resumed = training.Trainer(options, corpus)
    resumed.restore(folder.load())
    assert resumed.step == 6
    assert training.train(resumed, folder, second)

    assert first.losses + second.losses == whole.losses
    assert first.valid + second.valid == whole.valid
    rows = [{**row, "seconds": 0} for row in folder.read_metrics()]
    other = RunFolder(str(tmp_path / "a")).read_metrics()
    assert rows == [{**row, "seconds": 0} for row in other]
    saved, again = folder.load(), load_snapshot(tmp_path / "a")
    for name, array in saved.model.items():
        np.testing.assert_array_equal(array, again.model[name])


def test_training_learns(text: Path, tmp_path: Path) -> None:
    options = tiny(text, steps=60, lr=2e-2, dtype="float64")
    corpus = data.load(options.data, options.model.context)
    reporter = Silent()
    training.train(training.Trainer(options, corpus), RunFolder(str(tmp_path / "r")), reporter)
    assert np.mean(reporter.losses[-5:]) < 0.7 * reporter.losses[0]


def test_a_loss_that_is_no_number_ends_the_run(text: Path) -> None:
    options = tiny(text)
    trainer = training.Trainer(options, data.load(options.data, options.model.context))
    bias = trainer.model.lm_head.bias
    assert bias is not None
    bias.value._tensor._storage[:] = np.nan
    with pytest.raises(UserError, match="the loss is nan at step 1: try a smaller --lr"):
        trainer.train_step()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_a_kill_leaves_a_whole_checkpoint(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    values = {**TINY, "steps": 10**6, "save_every": 1, "eval_every": 10**6, "data": text}
    command = [sys.executable, str(SCRIPT), "train", "--out", str(out), *arguments(values)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint.safetensors").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert load_snapshot(out).step >= 1
    RunFolder(str(out)).start_metrics(1)  # the last line may be cut off
    assert len(RunFolder(str(out)).read_metrics()) == 1


# ----- the commands -----


def test_train_then_resume_then_sample(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    values = {**TINY, "data": text, "tokenizer": "char"}
    record = tmp_path / "page.md"
    command = ["--out", out, "--record", str(record), *arguments(values)]
    assert cli.main(command) == 0  # train is the default
    assert "12 steps of 32 tokens" in record.read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    for wanted in ("4-gram", "this transformer", "checkpoint.safetensors", "loss.png", "sample"):
        assert wanted in printed
    assert (Path(out) / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert cli.main(["train", "--resume", "--out", out]) == 0  # nothing is left to do
    capsys.readouterr()

    command = ["sample", "--out", out, "--prompt", "the ", "--tokens", "20", "--top-k", "3"]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert "the " in first
    assert cli.main(command) == 0
    assert capsys.readouterr().out == first
    assert cli.main([*command, "--seed", "7"]) == 0
    assert capsys.readouterr().out != first


def test_pieces_are_trained_and_sampled(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers")
    out = str(tmp_path / "run")
    values = {**TINY, "data": text, "tokenizer": "bpe", "vocab": 280, "steps": 2}
    assert cli.main(["train", "--out", out, *arguments(values)]) == 0
    assert cli.main(["sample", "--out", out, "--prompt", "日本", "--tokens", "5"]) == 0
    assert "日本" in capsys.readouterr().out


@pytest.mark.thorough
def test_compare_shows_the_same_loss(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {k: v for k, v in TINY.items() if not k.endswith("_every")}
    values |= {"data": text, "steps": 2, "dtype": "float64"}
    assert cli.main(["compare", *arguments(values)]) == 0
    printed = capsys.readouterr().out
    assert "flash" in printed and "standard" in printed
    assert float(printed.split("at any step: ")[1].split()[0]) < 1e-10


SPARSE = ["window:2", "dilated:2,2", "streaming:2,1", "longformer:4,1", "bigbird:2,1,1,1"]


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_attention_trains_is_saved_and_writes(
    kind: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, values = str(tmp_path / "run"), {**TINY, "data": text, "steps": 4, "attention": kind}
    assert cli.main(["train", "--out", out, *arguments(values)]) == 0
    snapshot = load_snapshot(RunFolder(out).checkpoint)
    assert snapshot.options.model.attention == kind
    assert cli.main(["train", "--resume", "--out", out, "--steps", "6"]) == 0
    assert cli.main(["sample", "--out", out, "--tokens", "20", "--prompt", "the"]) == 0
    assert "the" in capsys.readouterr().out
    model = models.build(snapshot.options.model, 20)
    prompt = np.array([1, 2, 3])
    written = [
        list(islice(sampling.generate(model, prompt, use_cache=cached), 12))
        for cached in (True, False)
    ]
    assert written[0] == written[1]


def test_sparse_attention_sees_less(text: Path) -> None:
    ids = np.arange(8)[None] % 5
    outputs = {}
    for kind in ("flash", *SPARSE):
        minitorch.manual_seed(1)
        model = models.build(tiny(text, attention=kind).model, 5)
        outputs[kind] = model(models.as_tensor(ids, model.backend)).to_numpy()
    for kind in SPARSE:
        assert np.abs(outputs[kind] - outputs["flash"])[0, -1].max() > 1e-4


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("narrow", "--attention must be flash, standard, or sparse: window[:left=32]"),
        ("window:x", "--attention window:x: invalid literal"),
        ("window:1,2", "--attention window:1,2: too many"),
        ("bigbird:4,2", "--attention bigbird:4,2: window must be odd"),
    ],
)
def test_kinds_of_attention_that_there_are_not(
    kind: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["train", "--attention", kind], ["compare", "--kinds", kind]):
        assert cli.main(command) == 1
        assert capsys.readouterr().err.startswith(f"error: {told}")


def test_a_comparison_is_recorded(text: Path, tmp_path: Path) -> None:
    values = {k: v for k, v in TINY.items() if not k.endswith("_every")}
    page = tmp_path / "kinds.md"
    command = ["compare", "--kinds", "flash", "window:2", "--record", str(page)]
    assert cli.main([*command, *arguments(values | {"data": text, "steps": 4})]) == 0
    written = page.read_text(encoding="utf-8")
    losses = [line.split("|")[2:6] for line in written.splitlines() if line.startswith("| window")]
    assert all(0 < float(x) < 6 for x in losses[0])
    command = re.search("run_transformer.py (compare.*) --record", written)[1].split()  # type: ignore
    assert command[:4] == ["compare", "--kinds", "flash", "window:2"]
    assert "--steps 4" in written and "--context 8" in written


def test_measured_kinds_agree(text: Path) -> None:
    flash, standard = (
        measure(tiny(text, steps=3, attention=kind)) for kind in ("flash", "standard")
    )
    np.testing.assert_allclose(flash.losses, standard.losses, rtol=1e-4)
    assert flash.seconds > 0


def test_peak_memory_is_seen() -> None:
    before = memory.restart_peak()
    if before == 0:
        pytest.skip("this system does not tell")
    np.ones(40_000_000 // 8).sum()
    assert memory.peak() - before > 20_000_000


# ----- bad input: one sentence, and an exit code that is not zero -----


def message(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    assert cli.main(command) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, "cannot read the text"),
        (b"  \n", "is empty"),
        (b"\xff\xfe\xff", "is not UTF-8"),
        (b"too short", "the text is too short: its training part has 8 tokens"),
    ],
)
def test_bad_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, wanted: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    command = ["train", "--data", str(path), "--out", str(tmp_path / "out")]
    assert wanted in message(capsys, command)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--heads", "3"], "--heads must divide --d-model = 128, got 3"),
        (["--layers", "0"], "--layers must be at least 1, got 0"),
        (["--lr", "nan"], "--lr must be above 0, got nan"),
        (["--dropout", "1"], "--dropout must be in [0, 1), got 1.0"),
        (["--seed", "-1"], "--seed must not be negative, got -1"),
        (["--held-out", "1"], "--held-out must be between 0 and 1, got 1.0"),
        (["--resume"], "there is no checkpoint at"),
        (["--precision", "bf16"], "--precision bf16 needs --device cuda"),
        (["--precision", "fp32", "--dtype", "float64"], "float32 weights, got --dtype float64"),
    ],
)
def test_bad_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], wanted: str
) -> None:
    command = ["train", "--out", str(tmp_path / "out"), *words]
    assert wanted in message(capsys, command)


@pytest.mark.skipif(minitorch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "compare"):
        code, (out, err) = cli.main([command, "--device", "cuda"]), capsys.readouterr()
        assert code == 1 and out == "" and err.startswith("error: --device cuda needs a GPU")


def test_precision_on_the_cpu_is_that_of_the_weights(text: Path) -> None:
    """What a checkpoint of the GPU needs, to be sampled anywhere."""
    options = tiny(text, precision="bf16", device="cuda")
    model = models.build(options.model, 20)
    assert model(models.as_tensor(np.array([[1, 2]]), model.backend)).dtype == np.float32


def test_bad_checkpoints(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = tiny(text)
    corpus = data.load(options.data, options.model.context)
    folder = RunFolder(str(tmp_path / "run"))
    folder.save(training.Trainer(options, corpus).snapshot())
    resume = ["train", "--resume", "--out", str(folder.path)]
    assert "started with --d-model 16, not 32" in message(capsys, [*resume, "--d-model", "32"])

    sample = ["sample", "--out", str(folder.path)]
    assert "the model's text had no 'Q', 'X'" in message(capsys, [*sample, "--prompt", "QX the"])
    assert "must not be negative" in message(capsys, [*sample, "--tokens", "-1"])

    text.write_text(SENTENCE * 19 + SENTENCE.replace("fox", "cat"), encoding="utf-8")
    assert "the text is not the one" in message(capsys, resume)

    snapshot = folder.load()
    snapshot.model["lm_head.bias"] = np.zeros(3, np.float32)
    folder.save(snapshot)
    assert "lm_head.bias has shape (3,)" in message(capsys, sample)

    folder.checkpoint.write_bytes(folder.checkpoint.read_bytes()[:1000])
    assert "is not a whole safetensors file" in message(capsys, sample)
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, {"x": np.ones(1)})
    assert "is not a checkpoint of this program" in message(capsys, ["sample", "--out", str(other)])


def test_a_folder_that_cannot_be_written(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    command = ["train", "--out", str(tmp_path / "file" / "run"), *arguments({**TINY, "data": text})]
    assert "cannot write" in message(capsys, command)


# ----- sampling -----


@pytest.mark.parametrize("attention", ["flash", "standard"])
def test_the_cache_changes_nothing(text: Path, attention: str) -> None:
    """Also past the end of the context, where reading begins anew."""
    options = tiny(text, attention=attention, dtype="float64")
    trainer = training.Trainer(options, data.load(options.data, options.model.context))
    prompt = trainer.corpus.valid_ids[:3]
    with_cache, without = (
        list(islice(sampling.generate(trainer.model, prompt, seed=3, use_cache=use), 20))
        for use in (True, False)
    )
    assert with_cache == without


# ----- beside PyTorch -----


def torch_losses(trainer: training.Trainer, steps: int) -> list[float]:
    """The same model, weights, batches and optimiser in PyTorch, written from its own parts."""
    torch = pytest.importorskip("torch")
    options = trainer.options
    weights = {
        name: torch.tensor(array, requires_grad=True)
        for name, array in trainer.model.state_dict().items()
    }
    training_options = options.training
    adamw = torch.optim.AdamW(
        [
            {"params": [w for w in weights.values() if w.dim() >= 2]},
            {"params": [w for w in weights.values() if w.dim() < 2], "weight_decay": 0.0},
        ],
        lr=training_options.lr,
        betas=(0.9, training_options.beta2),
        weight_decay=training_options.weight_decay,
    )
    losses = []
    for step in range(steps):
        inputs, targets = data.batch(
            trainer.corpus.train_ids,
            options.model.context,
            training_options.batch,
            training_options.seed,
            step,
        )
        logits = torch_logits(torch, weights, torch.tensor(inputs), options)
        flat = logits.reshape(-1, logits.shape[-1])
        loss = torch.nn.functional.cross_entropy(flat, torch.tensor(targets).reshape(-1))
        for group in adamw.param_groups:
            group["lr"] = trainer.schedule.lr_at(step)
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), training_options.clip)
        adamw.step()
        losses.append(loss.item())
    return losses


def torch_logits(torch: Any, weights: dict[str, Any], ids: Any, options: RunOptions) -> Any:
    functional, heads = torch.nn.functional, options.model.heads

    def linear(x: Any, name: str) -> Any:
        return x @ weights[f"{name}.weights"] + weights[f"{name}.bias"]

    def norm(x: Any, name: str) -> Any:
        scale, shift = weights[f"{name}.weights"], weights[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], scale, shift, 1e-5)

    def split(x: Any) -> Any:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, T, D / H)

    x = weights["token_embeddings.weights"][ids]
    x = x + weights["position_embeddings.weights"][: ids.shape[1]]
    for number in range(1, options.model.layers + 1):
        layer = f"t_layer_{number}"
        y = norm(x, f"{layer}.ln_1")
        q, k, v = (split(linear(y, f"{layer}.attention.{p}_projection")) for p in "qkv")
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(y.transpose(1, 2).flatten(2), f"{layer}.attention.out_projection")
        y = linear(norm(x, f"{layer}.ln_2"), f"{layer}.ff.linear_in")
        x = x + linear(functional.gelu(y, approximate="tanh"), f"{layer}.ff.linear_out")
    return linear(norm(x, "ln"), "lm_head")


@pytest.mark.parametrize("attention", ["flash", "standard"])
def test_the_loss_curve_follows_pytorch(text: Path, attention: str) -> None:
    """100 steps in float32, each loss within 1e-3."""
    pytest.importorskip("torch")
    options = tiny(
        text, layers=2, d_model=32, context=32, steps=100, warmup=10, lr=2e-3, attention=attention
    )
    trainer = training.Trainer(options, data.load(options.data, options.model.context))
    expected = torch_losses(trainer, 100)
    losses = [trainer.train_step() for _ in range(100)]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-3)
    assert losses[-1] < 0.8 * losses[0]


def test_inputs_have_the_dtype_of_the_model(text: Path) -> None:
    options = tiny(text, dtype="float32")
    trainer = training.Trainer(options, data.load(options.data, options.model.context))
    assert models.as_tensor(np.array([1]), trainer.model.backend).dtype == np.float32
    assert {p.value.dtype for p in trainer.model.parameters()} == {np.dtype(np.float32)}
    assert models.size(trainer.model) == sum(p.value.size for p in trainer.model.parameters())
