"""Forty ways to be wrong: each is one error line that names key or file, rule and way out, and no traceback."""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import assert_one_line, call

# Answered from the configuration alone.
CONFIG_ERRORS = {
    "unknown-key": (["quant.weight.bts=3"], ["quant.weight.bts", "no such setting"]),
    "unknown-top-level-key": (["sede=1"], ["sede", "no such setting"]),
    "added-key": (["+quant.new=3"], ["quant.new=3", "weight, activation"]),
    "added-nested-key": (["+quant.weight.bit=3"], ["quant.weight.bit=3", "did you mean bits"]),
    "added-existing-key": (["+seed=3"], ["seed"]),
    "unknown-choice": (["quant=w5a16"], ["quant=w5a16", "w4a16g128"]),
    "unknown-model": (["model=opt-6.8b"], ["model=opt-6.8b", "opt-6.7b"]),
    "unknown-method": (["method=magic"], ["method=magic", "rtn"]),
    "unknown-group": (["quantize=w4a16"], ["quantize", "no such setting"]),
    "bits-too-large": (["quant.weight.bits=17"], ["quant.weight.bits=17", "2 to 8"]),
    "bits-between": (["quant.weight.bits=9"], ["quant.weight.bits=9", "16"]),
    "float-weights-quantised-activations": (["quant=w8a8", "quant.weight.bits=16"], ["quant.weight.bits=16", "fp16"]),
    "bits-too-small": (["quant.weight.bits=1"], ["quant.weight.bits=1", "2 to 8"]),
    "bits-not-a-number": (["quant.weight.bits=four"], ["quant.weight.bits=four", "integer"]),
    "group-zero": (["quant.weight.group=0"], ["quant.weight.group=0"]),
    "group-negative": (["quant.weight.group=-128"], ["quant.weight.group=-128"]),
    "wrong-bool": (["quant.weight.symmetric=perhaps"], ["quant.weight.symmetric=perhaps"]),
    "wrong-scale": (["quant.weight.scale=float8"], ["quant.weight.scale=float8", "float16"]),
    "target-outside": (["method._target_=os.system"], ["os.system", "lsiq"]),
    "target-not-settings": (
        ["method._target_=lsiq.experiment.run.run"],
        ["lsiq.experiment.run.run", "not a settings class"],
    ),
    "target-missing": (["method._target_=lsiq.methods.magic.Magic"], ["lsiq.methods.magic.Magic", "no such class"]),
    "target-of-another-kind": (
        ["method=rtn", "method._target_=lsiq.runtime.settings.PathSettings"],
        ["method", "not a method"],
    ),
    "block-bits": (["quant=w4a8-mxint", "quant.weight.bits=9"], ["quant.weight.bits=9", "2 to 8"]),
    "block-exponent": (["quant=w4a8-mxint", "quant.weight.exponent=5"], ["quant.weight.exponent=5", "4 or 8"]),
    "negative-rank": (["method=lqer", "method.rank=-1"], ["method.rank=-1", "at least 0"]),
    "two-low-ranks": (["method=lqer", "method@method.then=l2qer"], ["method.then", "low-rank"]),
    "low-rank-inside-clipping": (["method=awq", "method@method.then=lqer"], ["method.then", "method.clip=false"]),
    "no-process": (
        ["-m", "seed=0,1", "hydra/launcher=processes", "hydra.launcher.n_jobs=0"],
        ["hydra.launcher.n_jobs=0", "1 or more"],
    ),
    "unknown-launcher": (["-m", "hydra/launcher=rya"], ["hydra/launcher=rya", "processes, ray, slurm"]),
    "launcher-of-one-run": (["hydra/launcher=slurm"], ["hydra/launcher=slurm", "-m", "sweep="]),
    "search-of-one-run": (["hydra/sweeper=tpe"], ["hydra/sweeper=tpe", "-m", "sweep="]),
    "ray-retries": (["-m", "hydra/launcher=ray", "hydra.launcher.retries=-1"], ["hydra.launcher.retries=-1", "from 0"]),
    "no-trials": (["-m", "hydra/sweeper=tpe", "hydra.sweeper.trials=0"], ["hydra.sweeper.trials=0", "at least 1"]),
    "no-trials-of-a-study": (["sweep=search-lsi", "hydra.sweeper.trials=0"], ["hydra.sweeper.trials=0", "at least 1"]),
    "search-with-variants": (["sweep=search-lsi", "hydra.sweeper.only=[a]"], ["hydra.sweeper.only", "has no variants"]),
    "unknown-study": (["sweep=everything"], ["sweep=everything", "baselines"]),
    "negative-seed": (["seed=-1"], ["seed=-1"]),
    "no-samples": (["calib.samples=0"], ["calib.samples=0", "at least 1"]),
    "short-windows": (["eval.seqlen=2"], ["eval.seqlen=2", "at least 8"]),
    "unknown-corpus": (["eval.corpora=[wikitext3]"], ["eval.corpora", "wikitext2"]),
    "mixture-without-weights": (["calib=mix"], ["calib.mix", "calib.mix.wikitext2=1"]),
    "template-of-a-corpus": (["+calib.template=true"], ["calib.template=true", "calib=file"]),
    "file-without-path": (["calib=file"], ["calib.path=null", "calib.path=FILE"]),
    "eval-file-without-path": (["eval=file"], ["eval.path=null", "eval.path=FILE"]),
    "unknown-device": (["device=tpu"], ["device=tpu", "cuda"]),
    "unknown-dtype": (["model.dtype=int8"], ["model.dtype=int8", "bfloat16"]),
    "unknown-weights": (["model.weights=none"], ["model.weights=none", "random"]),
    "tracker-mode": (["tracker.mode=loud"], ["tracker.mode=loud", "offline"]),
    "tracker-panels": (["tracker.panels=-1"], ["tracker.panels=-1", "at least 0"]),
    "tracker-without-network": (
        ["tracker=tensorboard", "tracker.mode=offline"],
        ["tracker.mode=offline", "tracker=tensorboard", "mode=auto"],
    ),
    "unknown-tracker": (["tracker=mlflaw"], ["tracker=mlflaw", "tensorboard"]),
    "group-as-value": (["quant=null"], ["quant", "group=choice"]),
    "missing-folder": (["model.path=/nowhere/at/all"], ["model.path=/nowhere/at/all", "no such folder"]),
    "missing-text": (["calib=file", "calib.path=/nowhere.txt"], ["calib.path=/nowhere.txt", "no such file"]),
    "misspelt-option": (["--hlep"], ["--hlep", "did you mean --help"]),
    "no-equal-sign": (["quant"], ["quant", "key=value"]),
    "list-wanted": (["eval.corpora=bundled"], ["eval.corpora=bundled", "list"]),
    "empty-override": (["=3"], ["key=value"]),
    "local-not-measured": (["eval.local.c4=/nowhere"], ["eval.local.c4", "not among"]),
    "task-file-not-measured": (["eval.tasks_local.piqa=/nowhere"], ["eval.tasks_local.piqa", "not among"]),
    "added-task-file": (
        ["eval.tasks=[gsm8k]", "+eval.tasks_local.gsm8k=/nowhere"],
        ["eval.tasks_local.gsm8k=/nowhere", "no such file"],
    ),
    "missing-task-file": (
        ["eval=zeroshot", "eval.tasks_local.piqa=/nowhere"],
        ["eval.tasks_local.piqa=/nowhere", "no such file"],
    ),
    "no-items": (["eval.items=0"], ["eval.items=0"]),
    "task-with-a-path": (["eval.tasks=[../task.yaml]"], ["eval.tasks", "letters, digits"]),
    "mandatory-value": (["method=lsi-finetune"], ["method.run has no value"]),
    "missing-run": (["method=lsi-finetune", "method.run=nothing"], ["method.run=nothing", "no such run"]),
    "place-twice": (["method=rotate", "method.places=[down,down]"], ["method.places", "twice"]),
    "rotation-in-blocks": (["method=rotate", "method.block=16", "method.steps=9"], ["method", "block=16", "steps=0"]),
    "rotation-of-nothing": (
        ["method=rotate", "method.places=[value]", "method.steps=9"],
        ["method", "steps=9", "add residual"],
    ),
    "rotation-without-tokens": (["method=rotate", "method.steps=9", "calib=none"], ["calib.corpus=null", "rotate"]),
    "no-such-place": (["method=duquant", "method.places=[query_key]"], ["method.places", "norm"]),
    "empty-prefix": (["method=prefix", "method.count=0", "method.bos=false"], ["count=0", "bos=true"]),
    "prefix-without-tokens": (["method=prefix", "calib=none"], ["calib.corpus=null", "prefix"]),
    "rounded-ahead": (
        [
            "method=rotate",
            "method@method.then=lsi",
            "method.then.training.ahead.blocks=1",
            "method.then.training.ahead.later=rtn",
        ],
        ["method.then", "later=rtn", "later=float"],
    ),
    "export-rotations": (["export=plain", "method=rotate"], ["export=plain", "rotations", "method=rotate"]),
    "export-prefix": (
        ["export=plain", "method=e2e", "method.run=null", "method@method.start=prefix"],
        ["export=plain", "a prefix", "prefix"],
    ),
    "export-planted": (["export=plain", "model.outliers=2"], ["model.outliers=2", "model.outliers=0"]),
    "negative-outliers": (["model.outliers=-1"], ["model.outliers=-1"]),
    "unknown-export": (["export=onnx"], ["export=onnx", "gguf"]),
    "export-without-group": (["export.push=me/model"], ["export.push", "no such setting"]),
    "export-target": (["+export._target_=lsiq.methods.rtn.RTN"], ["export", "not an export"]),
    "export-bits": (["export=gguf", "quant.weight.bits=8"], ["asymmetric", "Q8_0", "quant.weight.bits=7"]),
    "export-type": (["export=gguf", "export.type=Q3_K"], ["export.type=Q3_K", "Q5_0"]),
    "export-scales": (["export=gptq"], ["quant.weight.scale=float32", "export.round_scales=true"]),
    "export-blocks": (
        ["export=gptq", "quant=w4a8-mxint", "quant.activation.bits=16"],
        ["export=gptq", "integers in groups", "export=plain"],
    ),
    "export-low-rank": (
        ["export=compressed-tensors", "method=lqer"],
        ["export=compressed-tensors", "low-rank", "export=plain"],
    ),
    "export-push": (["export=plain", "export.push=me"], ["export.push=me", "owner/name"]),
    "export-of-random-weights": (["export=plain", "model.weights=random"], ["model.weights=random", "checkpoint"]),
    "from-nothing": (["from=nothing", "export=plain"], ["from=nothing", "no such run"]),
    "from-without-export": (["from=nothing"], ["from=nothing", "export="]),
    "from-with-settings": (["from=x", "export=plain", "quant=w2a16"], ["quant=w2a16", "from=x"]),
    "scales-of-blocks": (["method=e2e", "method.run=x", "quant=w4a8-mxint"], ["method.scales", "stored in a few bits"]),
    "waiting-jointly": (["method.training.wait=3"], ["method.training.wait=3", "schedule=staged"]),
    "two-starts": (["method=best", "method.weight_only.run=x"], ["method.weight_only.run and start", "one of them"]),
    "best-on-blocks": (
        ["method=best", "quant=w4a8-mxint", "method.narrow_blocks.scales=0.001"],
        ["method.narrow_blocks.scales=0.001", "use method.narrow_blocks.scales=null"],
    ),
    "best-on-floating-activations": (
        ["method=best", "quant=mxfp4", "method.wide_blocks.scales=0.001"],
        ["method.wide_blocks.scales=0.001", "use method.wide_blocks.scales=null"],
    ),
    "best-inside": (
        ["method=best", "method.weight_only.start.parts.0.lr=-1"],
        ["method.weight_only.start.parts.dense.lr=-1", "above 0"],
    ),
    "whole-method-inside": (
        ["method=rotate", "method@method.then=e2e", "method.then.run=x"],
        ["method.then=e2e: cannot stand there", "the method that quantises the rotated block"],
    ),
    "steps-of-norms": (
        ["method=dense", "method.parts.0.unit=step", "method.parts.0.tensors=all"],
        ["unit=step", "linears"],
    ),
    "tuned-low-rank": (
        ["method=e2e", "method.run=null", "method@method.start=lqer"],
        ["method.start", "low-rank", "not trained"],
    ),
    "signed-part-unknown": (["method=lsi", "method.training.signed=[clap]"], ["training.signed", "has no clap"]),
    "window-weights": (["method=lsi", "method.training.ahead.weights=[1,1]"], ["training.ahead", "blocks=0 needs 1"]),
    "no-full-logit": (["method=lwc", "method.parts.0.start_logit=null"], ["start_logit=null", "form=linear"]),
    "rules-in-no-list": (["quant.rules={match: lm_head, format: w8}"], ["quant.rules: is a list; write quant.rules=["]),
    "keys-in-a-list": (["quant.kv=[8]"], ["quant.kv: holds keys and no list; write quant.kv.KEY=value"]),
    "key-of-a-rule": (["quant.rules=[{match: lm_head, formt: w8}]"], ["quant.rules.0.formt=w8", "did you mean format"]),
    "rule-without-format": (["quant.rules=[{match: lm_head}]"], ["quant.rules.0.format has no value", "w8g128"]),
    "format-of-a-rule": (["quant.rules=[{format: w9g128}]"], ["quant.rules.0.format=w9g128", "w2 to w8"]),
    "two-limits": (
        ["quant.allocate.bits=3", "quant.allocate.bytes=99"],
        ["error: quant.allocate.bits=3.0: and bytes=99 are two limits"],
    ),
    "choices-without-limit": (
        ["quant.allocate.choices=[w2g128,w4g128]"],
        ["quant.allocate.choices=['w2g128', 'w4g128']: bits are shared out under a limit; set bits or bytes as well"],
    ),
    "scale-of-activations": (
        ["quant=nvfp4", "quant.activation.above=foo"],
        ["quant.activation.above=foo: input should be 'token' or 'tensor'", "the float32 scale itself"],
    ),
    "allocate-without-text": (
        ["method=rtn", "quant.allocate.bits=3", "calib=none"],
        ["calib.corpus=null: quant.allocate needs calibration tokens", "calib=bundled"],
    ),
    "cache-bits": (["quant.kv.bits=9"], ["error: quant.kv.bits=9: nothing lies between 8 and 16; use 2 to 8"]),
    "cache-in-gguf": (["quant.kv.bits=8", "export=gguf"], ["export=gguf says nothing of keys and values"]),
    "streams-on-tape": (["paths.streams=tape"], ["paths.streams=tape", "memory", "disk"]),
    "no-hub": (["model=opt-125m"], ["facebook/opt-125m", "model.path", "cache"]),
}


@pytest.mark.parametrize("name", CONFIG_ERRORS)
def test_a_wrong_configuration_is_one_line(name: str, tmp_path: Path) -> None:
    arguments, wanted = CONFIG_ERRORS[name]
    done, _ = call(*arguments, cwd=tmp_path)
    assert_one_line(done, wanted)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["unknown-key", "missing-text", "two-low-ranks", "unknown-launcher", "no-trials"])
def test_a_wrong_configuration_is_answered_within_a_second(name: str, tmp_path: Path) -> None:
    arguments, wanted = CONFIG_ERRORS[name]
    done, seconds = call(*arguments, cwd=tmp_path, fresh=True)
    assert_one_line(done, wanted)
    # Measured: 0.6 s on an idle machine; a busy one takes more for the same work.
    assert seconds < 3.0


def empty_text(folder: Path) -> list[str]:
    (folder / "empty.txt").write_text("  \n\n")
    return ["calib=file", "calib.path=empty.txt"]


def short_text(folder: Path) -> list[str]:
    (folder / "short.txt").write_text("Not much to read.")
    return ["eval=file", "eval.path=short.txt"]


def binary_text(folder: Path) -> list[str]:
    (folder / "image.txt").write_bytes(bytes(range(256)) * 20)
    return ["calib=file", "calib.path=image.txt"]


def damaged_xz(folder: Path) -> list[str]:
    (folder / "text.txt.xz").write_bytes(lzma.compress(b"Some text. " * 9000)[:100])
    return ["eval=file", "eval.path=text.txt.xz"]


def wrong_field(folder: Path) -> list[str]:
    (folder / "text.jsonl").write_text(json.dumps({"body": "words"}) + "\n")
    return ["eval=file", "eval.path=text.jsonl"]


def broken_json(folder: Path) -> list[str]:
    (folder / "text.jsonl").write_text('{"text": "words"}\n{"text": \n')
    return ["eval=file", "eval.path=text.jsonl"]


def truncated_weights(folder: Path, checkpoint: Path) -> list[str]:
    copy = shutil.copytree(checkpoint, folder / "model")
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-999])
    return ["model.path=model"]


def no_config(folder: Path, checkpoint: Path) -> list[str]:
    (shutil.copytree(checkpoint, folder / "model") / "config.json").unlink()
    return ["model.path=model"]


def broken_config(folder: Path, checkpoint: Path) -> list[str]:
    (shutil.copytree(checkpoint, folder / "model") / "config.json").write_text("{")
    return ["model.path=model"]


def no_weights(folder: Path, checkpoint: Path) -> list[str]:
    (shutil.copytree(checkpoint, folder / "model") / "model.safetensors").unlink()
    return ["model.path=model"]


def no_tokenizer(folder: Path, checkpoint: Path) -> list[str]:
    (shutil.copytree(checkpoint, folder / "model") / "tokenizer.json").unlink()
    return ["model.path=model"]


def other_family(folder: Path, checkpoint: Path) -> list[str]:
    copy = shutil.copytree(checkpoint, folder / "model")
    (copy / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return ["model.path=model"]


def wrong_item(folder: Path) -> list[str]:
    (folder / "items.jsonl").write_text('{"query": "Question: x", "choices": ["a"], "gold": 3}\n')
    return ["eval=zeroshot", "eval.tasks=[arc_easy]", "eval.tasks_local.arc_easy=items.jsonl"]


def plan_of_one_linear(folder: Path) -> list[str]:
    (folder / "plan.json").write_text(json.dumps({"layers": {"0.fc1": "w3g128"}}))
    return ["quant.plan=plan.json"]


INPUT_ERRORS: dict[str, tuple[Callable[..., list[str]], list[str]]] = {
    "empty-text": (empty_text, ["empty.txt", "empty"]),
    "short-text": (short_text, ["short.txt", "eval.seqlen=512"]),
    "binary-text": (binary_text, ["image.txt", "UTF-8"]),
    "damaged-xz": (damaged_xz, ["text.txt.xz"]),
    "wrong-field": (wrong_field, ["text.jsonl", "text"]),
    "broken-json": (broken_json, ["text.jsonl", "line 2"]),
    "truncated-weights": (truncated_weights, ["model.safetensors", "cannot be read"]),
    "no-config": (no_config, ["config.json"]),
    "broken-config": (broken_config, ["config.json"]),
    "no-weights": (no_weights, ["model.safetensors"]),
    "no-tokenizer": (no_tokenizer, ["tokenizer"]),
    "other-family": (other_family, ["gpt2", "llama"]),
    "windows-too-long": (lambda _: ["eval.seqlen=4096"], ["eval.seqlen=4096", "1024"]),
    "group-that-does-not-divide": (lambda _: ["quant.weight.group=100"], ["quant.weight.group=100", "384", "64"]),
    "block-that-does-not-divide": (
        lambda _: ["quant=w4a8-mxint", "quant.weight.block=24"],
        ["quant.weight.block=24", "1024", "16"],
    ),
    "group-of-a-cache": (
        lambda _: ["quant.kv.bits=4", "quant.kv.group=48"],
        ["quant.kv.group=48", "head_dim=64", "quant.kv.group=32"],
    ),
    "rule-that-matches-nothing": (
        lambda _: ["quant.rules=[{match: self_attn.qkv, format: w8}]"],
        ["quant.rules[0].match=self_attn.qkv: matches no linear of tiny-llama", "self_attn.q_proj", "lm_head"],
    ),
    "blocks-that-are-not-there": (
        lambda _: ["quant.rules=[{blocks: '6:9', format: w8}]"],
        ["quant.rules[0].blocks=6:9: tiny-llama has blocks 0 to 5"],
    ),
    "too-few-bits": (
        lambda _: ["quant.allocate.bits=2.1"],
        ["quant.allocate.bits=2.1", "takes 2.1406 bits", "give 2.1406 or more"],
    ),
    "too-few-bytes": (lambda _: ["quant.allocate.bytes=1000"], ["quant.allocate.bytes=1000", "give 2525184 or more"]),
    "choice-that-does-not-divide": (
        lambda _: ["quant.allocate.bits=3", "quant.allocate.choices=[w2g128,w4g100]"],
        ["the group of w4g100 does not divide in_features=384", "w4g64"],
    ),
    "plan-of-another-model": (
        plan_of_one_linear,
        ["quant.plan=plan.json: names 0.fc1", "tiny-llama has 42 linears", "made for this model"],
    ),
    "rank-above-all": (lambda _: ["method=lqer", "method.rank=999"], ["method.rank=999", "384"]),
    "no-such-gpu": (lambda _: ["device=cuda:9"], ["device=cuda:9"]),
    "runs-is-a-file": (lambda folder: [f"paths.runs={(folder / 'taken').write_text('x') and 'taken'}"], ["paths.runs"]),
    "unknown-task": (lambda _: ["eval.tasks=[arc_eazy]"], ["eval.tasks", "arc_eazy", "arc_easy"]),
    "hub-task-offline": (lambda _: ["eval=zeroshot"], ["arc_easy", "eval.tasks_local.arc_easy=FILE"]),
    "wrong-item": (wrong_item, ["items.jsonl", "line 1"]),
    "hub-corpus-offline": (lambda _: ["eval=wikitext2"], ["Salesforce/wikitext", "eval.local.wikitext2"]),
}


# Importing torch takes seconds, on a busy machine half a minute. Only the name of a task is sought for a second more.
@pytest.mark.parametrize("name", INPUT_ERRORS)
def test_a_wrong_input_is_one_line_before_torch_is_imported(
    name: str, tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    if name in ("unknown-task", "hub-task-offline", "wrong-item"):
        pytest.importorskip("lm_eval")
    prepare, wanted = INPUT_ERRORS[name]
    takes_checkpoint = prepare.__code__.co_argcount == 2
    arguments = prepare(tmp_path, checkpoints["llama"]) if takes_checkpoint else prepare(tmp_path)
    done, _ = call("tracker=none", *arguments, cwd=tmp_path, without="torch")
    assert_one_line(done, wanted)


def test_debug_asks_for_the_traceback(tmp_path: Path) -> None:
    done, _ = call("seed=-1", "debug=trace", cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.mark.slow
def test_in_a_sweep_a_wrong_job_does_not_stop_the_others(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    done, _ = call(
        "-m",
        "method=rtn",
        "quant.weight.group=40,32",
        f"model.path={checkpoints['llama']}",
        "calib=none",
        "eval=none",
        "tracker=none",
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    statuses = sorted(json.loads(file.read_text())["status"] for file in tmp_path.glob("runs/*/record.json"))
    assert statuses == ["failed", "finished"]
