"""Training of the bundled models at a tiny budget: it learns, resumes exactly, and its checkpoint loads back."""

import json
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.marks import slow_but
from transformers import AutoModelForCausalLM, AutoTokenizer

from lsiq.bundle.ladder import LADDER
from lsiq.bundle.model import build_model, hidden_states
from lsiq.bundle.tokenizer import Source, encode_documents, load_tokenizer, token_stream
from lsiq.bundle.train import main
from lsiq.bundle.training import Plan, Run, Windows, train
from lsiq.errors import InputError
from lsiq.runtime import processes

TEXT = "the a small river runs past old stone houses where people read long books about stars and salt"
FAMILIES = ("llama", "opt")
ODD = "  Two  spaces,\n\n tabs\t naïve 戦場 🙂 @-@ <unk> it's 1987 .\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `a.txt` and a tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("train")
    pick = random.Random(0)
    lines = [" ".join(pick.choices(TEXT.split(), k=12)) + "." for _ in range(600)]
    (folder / "a.txt").write_text("\n<|endoftext|>\n".join("\n".join(lines[i : i + 20]) for i in range(0, 600, 20)))
    main(["--train-tokenizer", str(folder / "tok"), "--vocab", "300", "--text", str(folder / "a.txt")])
    return folder


def arguments(folder, family, out, steps, rung="3m"):
    text, budget = str(folder / "a.txt"), str(steps * 4 * 32)
    shape = ["--batch", "4", "--seqlen", "32", "--valid", text, "--valid-every", "50", "--device", "cpu"]
    return ["--family", family, "--rung", rung, "--text", text, "--tokenizer", str(folder / "tok"), "--tokens", budget,
            *shape, "--out", str(out), "--lr", "1e-3"]  # fmt: skip


def plan(**changes):
    values = {"family": "opt", "tokens": 10**6, "minutes": 1.0, "job_minutes": 1.0, "batch": 3, "seqlen": 8, "lr": 1e-3}
    return Plan(**(values | {"warmup": 0.03, "seed": 0, "valid_every": 50, "rung": "3m"} | changes))


@pytest.fixture(scope="module", params=slow_but(["llama"], FAMILIES))
def trained(request, folder, tmp_path_factory):
    """A folder with a model trained for 8 steps."""
    out = tmp_path_factory.mktemp(request.param)
    main(arguments(folder, request.param, out, 8))
    return out


def test_tokenizer_round_trips_and_adds_nothing(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    ids = tokenizer(ODD)["input_ids"]
    assert tokenizer.decode(ids) == ODD
    assert 0 not in ids
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0


def test_training_lowers_the_loss(trained):
    row = json.loads((trained / "curve.jsonl").read_text().splitlines()[-1])
    # Measured after 8 steps: llama 4.57, opt 4.71; an untrained model has log 300 = 5.70.
    assert row["valid"] < math.log(300) - 0.5
    assert row["tokens"] == 8 * 4 * 32


def test_checkpoint_loads_as_bfloat16_with_the_trained_weights(trained):
    model = AutoModelForCausalLM.from_pretrained(trained)
    state = torch.load(trained / "state.pt", weights_only=True)["model"]
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state[name].bfloat16()), name


def test_finished_run_only_writes_its_checkpoint_again(trained, folder):
    before = (trained / "model.safetensors").read_bytes()
    family = json.loads((trained / "config.json").read_text())["model_type"]
    main(arguments(folder, family, trained, 8))
    assert (trained / "model.safetensors").read_bytes() == before


def test_other_settings_than_the_state_are_refused(trained, folder):
    family = json.loads((trained / "config.json").read_text())["model_type"]
    with pytest.raises(InputError, match="seed=0"):
        main([*arguments(folder, family, trained, 8), "--seed", "1"])


class Interrupted(Windows):
    """Windows that end a run the hard way when it asks for step 5, just after its state was saved."""

    def at(self, step):
        if step == 5:
            self.run.save()
            raise KeyboardInterrupt
        return super().at(step)


def test_interrupted_run_ends_with_the_weights_of_an_unbroken_one(trained, folder, tmp_path):
    family = json.loads((trained / "config.json").read_text())["model_type"]
    tokenizer, device = load_tokenizer(folder / "tok"), torch.device("cpu")
    settings = plan(family=family, tokens=8 * 4 * 32, minutes=math.inf, job_minutes=math.inf, batch=4, seqlen=32)
    windows = Interrupted(token_stream(tokenizer, Source(str(folder / "a.txt")), tmp_path), settings, device)
    windows.run = Run(settings, tokenizer.get_vocab_size(), tmp_path, device)
    with pytest.raises(KeyboardInterrupt):
        train(windows.run, windows, None, compiled=False)
    main(arguments(folder, family, tmp_path, 8))
    assert (tmp_path / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_direct_layer_calls_equal_the_transformers_forward(family):
    torch.manual_seed(0)
    model = build_model(family, 300, LADDER["3m"]).eval()
    ids = torch.randint(300, (2, 40))
    with torch.no_grad():
        ours = model.lm_head(hidden_states(model, ids))
        theirs = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(ours, theirs, atol=1e-5)  # measured 0


@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_shape_fits_24_megabytes(family):
    count = sum(p.numel() for p in build_model(family, 4096, LADDER["11m"]).parameters())
    assert 6e6 < count < 12e6
    assert 2 * count + 20_000 < 24_000_000  # llama 22.0 MB, opt 22.9 MB; the header takes less than 20 kB


def test_a_rung_has_a_batch_and_a_rate_for_each_family():
    rung = LADDER["90m"]
    assert (rung.batch_of("llama"), rung.rate_of("llama")) == (64, 1.2e-3)
    assert (rung.batch_of("opt"), rung.rate_of("opt")) == (32, 8e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rung", LADDER)
def test_rungs_weigh_what_their_names_say_and_take_groups_of_128(family, rung):
    with torch.device("meta"):
        model = build_model(family, 4096, LADDER[rung])
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(1e6 * int(rung[:-1]), rel=0.25)  # measured: 0.96 (300m llama) to 1.23 (3m opt)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(layer.in_features % 128 == 0 for layer in layers)


def test_card_tells_shape_recipe_and_curve(trained):
    card, last = (trained / "README.md").read_text(), (trained / "curve.jsonl").read_text().splitlines()[-1]
    state = torch.load(trained / "state.pt", weights_only=True)["model"]
    family = json.loads((trained / "config.json").read_text())["model_type"]
    tied = state["lm_head.weight"].numel()
    assert f"# {family}-3m" in card
    assert f"| parameters | {sum(weight.numel() for weight in state.values()) - tied:,} |" in card
    assert "batch 4 × 32, peak rate 0.001" in card
    assert f"| {json.loads(last)['train']:.3f} | {json.loads(last)['valid']:.3f} |" in card
    assert str(trained.parent) not in card


@pytest.mark.product
def test_two_processes_take_the_steps_of_one(trained, folder, tmp_path):
    family = json.loads((trained / "config.json").read_text())["model_type"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "lsiq.bundle.train", *arguments(folder, family, tmp_path, 8)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 8 ") == 1  # one speaks
    ours, theirs = (json.loads((out / "curve.jsonl").read_text().splitlines()[-1]) for out in (tmp_path, trained))
    # Measured: apart by 5e-7; by 0.06 and more where both processes train on the same half of the batch.
    assert ours["train"] == pytest.approx(theirs["train"], abs=1e-4)
    assert ours["valid"] == pytest.approx(theirs["valid"], abs=1e-4)


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(monkeypatch):
    monkeypatch.setattr(processes, "_group", processes._Group(rank=0, size=2))
    with pytest.raises(InputError, match="--batch 3: does not divide among 2 processes"):
        Windows(np.zeros(200, np.uint16), plan(batch=3), torch.device("cpu"))


def test_an_epoch_takes_every_window_once(folder):
    stream = encode_documents(load_tokenizer(folder / "tok"), ["river " * 400])
    stream[:] = range(len(stream))
    windows = Windows(stream, plan(), torch.device("cpu"))
    steps = windows.count // 3
    seen = torch.cat([windows.at(step)[:, 0] for step in range(steps)]).tolist()
    assert len(set(seen)) == len(seen) == steps * 3
    assert {start % 8 for start in seen} == {seen[0] % 8}
    assert windows.at(steps)[:, 0].tolist() != windows.at(0)[:, 0].tolist()


def test_rate_warms_up_and_decays_to_zero():
    rates = [plan(warmup=0.1).factor(done / 100) for done in range(101)]
    assert rates[0] == 0
    assert rates[10] == 1
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_token_cache_is_kept_until_the_text_changes(folder, tmp_path):
    tokenizer, text = load_tokenizer(folder / "tok"), tmp_path / "b.txt"
    text.write_text("stone houses\n<|endoftext|>\nriver")
    first = token_stream(tokenizer, Source(str(text)), tmp_path)
    assert tokenizer.decode(first.tolist(), skip_special_tokens=False) == "stone houses<|endoftext|>river<|endoftext|>"
    token_stream(tokenizer, Source(str(text)), tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 1
    text.write_text("stone")
    token_stream(tokenizer, Source(str(text)), tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_repeat_is_read_from_the_text_argument():
    assert Source.parse("a.txt*3") == Source("a.txt", 3)
    with pytest.raises(InputError, match=r"PATH\*2"):
        Source.parse("a.txt*x")
