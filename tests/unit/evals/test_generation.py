"""Generated text is what transformers' own greedy `generate` writes, token by token."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
import torch
from helpers.configuration import compose_run
from helpers.evaluations import NO_CACHE, request, unchanged
from helpers.families import FAMILIES
from helpers.marks import slow
from helpers.models import SHAPES, load_small, save_model
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM

from lsiq.assets import bundled_model
from lsiq.errors import ConfigError, InputError, ResourceError
from lsiq.evals import task_names
from lsiq.evals.generation import Prompt, Writer, check_room, write_answers
from lsiq.evals.harness import check_tasks
from lsiq.evals.harness_model import BlockLM
from lsiq.evals.settings import EvalSettings
from lsiq.evals.tasks import fetch_punkt, load_tasks, read_rows
from lsiq.evals.windows import Variant
from lsiq.experiment.config import parse
from lsiq.experiment.run import run
from lsiq.formats.activation import Activation
from lsiq.formats.integer import Integer
from lsiq.formats.tensor import quantize
from lsiq.methods.rotate import Rotate
from lsiq.methods.rtn import RTN
from lsiq.models.block import Block, BlockFunction
from lsiq.models.loading import Model, load
from lsiq.models.result import BlockResult
from lsiq.models.settings import ModelSettings
from lsiq.runtime.cache import ContentCache

TEXTS = ["The first president of the United States was", "In 1969,", "A river is", "The city of Paris lies on the"]


def prompts(model: Model, limit: int = 24, *stops: str) -> list[Prompt]:
    return [Prompt(tuple(model.tokenizer.encode(text)), stops, limit) for text in TEXTS]


@torch.no_grad()
def generated(folder: Path, asked: list[Prompt], prefix: tuple[int, ...] = ()) -> list[list[int]]:
    """Of transformers' `generate`, one prompt at a time."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt in asked:
        ids = torch.tensor([[*prefix, *prompt.tokens]])
        out = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=prompt.limit, do_sample=False)
        found.append(out[0, ids.shape[1] :].tolist())
    return found


@pytest.mark.parametrize("name", ["tiny-llama", slow("tiny-opt")])
def test_a_bundled_model_writes_what_generate_writes(name: str) -> None:
    model = load_small(bundled_model(name))
    asked = prompts(model)
    expected = generated(bundled_model(name), asked)
    assert len({tuple(answer) for answer in expected}) == len(TEXTS)
    assert Writer(model, unchanged).write(asked) == expected  # one batch, padded on the left
    assert [Writer(model, unchanged).write([prompt])[0] for prompt in asked[:2]] == expected[:2]


@pytest.mark.parametrize("family", ["gemma3", *map(slow, ["gemma2", "phi3", "smollm3", "granite", "olmo2"])])
def test_a_family_writes_what_generate_writes(family: str, tmp_path: Path) -> None:
    folder = save_model(FAMILIES[family], tmp_path / "model", std=0.3)
    model = load_small(folder)
    asked = prompts(model, 30)  # beyond the windows of 16 and 20 tokens
    assert Writer(model, unchanged).write(asked) == generated(folder, asked)


def test_a_prefix_stands_before_what_is_written(tmp_path: Path) -> None:
    for family in ("llama", "opt"):
        folder = save_model(SHAPES[family], tmp_path / family, std=0.3)
        model = load_small(folder)
        asked = prompts(model)
        after = model.with_prefix(torch.tensor([5, 900]))
        found = Writer(after, unchanged).write(asked)
        assert found == generated(folder, asked, (5, 900))
        turned = Rotate(then=RTN()).prepare_model(after, None, 2, torch.Generator().manual_seed(0))
        assert Writer(turned, unchanged).write(asked) == found


def test_a_prefix_before_windows_is_refused(tmp_path: Path) -> None:
    model = load_small(save_model(FAMILIES["gemma2"], tmp_path / "model")).with_prefix(torch.tensor([5]))
    with pytest.raises(InputError, match="out of which the prefix falls"):
        Writer(model, unchanged)


def test_long_rope_is_refused_where_it_would_change_within_an_answer(tmp_path: Path) -> None:
    folder = save_model(FAMILIES["phi4-mini"], tmp_path / "model", std=0.3)
    model = load_small(folder)
    asked = prompts(model, 8)
    assert Writer(model, unchanged).write(asked) == generated(folder, asked)
    with pytest.raises(InputError, match=r"goes beyond 32, where this model changes its rotary embedding"):
        Writer(model, unchanged).write(prompts(model, 40))


def test_quantised_queries_keys_and_values_are_those_of_the_whole_sequence(tmp_path: Path) -> None:
    """Of each written token, reading the whole text anew says the same: nothing of the cache was left in float."""
    model = load_small(save_model(SHAPES["llama"], tmp_path / "model", std=0.3)).with_prefix(torch.tensor([5, 900]))
    fmt = Activation(bits=4)

    def rounded(block: Block) -> BlockFunction:
        weights = {name: quantize(block.weights[name], Integer(bits=4, group=32), name) for name in block.linears}
        return block.with_result(BlockResult(weights), fmt)

    asked = prompts(model, 12)
    answers = Writer(model, rounded).write(asked)
    for prompt, answer in zip(asked, answers, strict=True):
        tokens = torch.tensor([[*prompt.tokens, *answer]])
        hidden, kwargs = model.embed(tokens, 1)
        for index in range(model.depth):
            hidden = rounded(model.block(index, kwargs))(hidden)
        said = model.logits(hidden)[0].argmax(-1).tolist()
        assert said[len(prompt.tokens) - 1 : -1] == answer


def test_an_answer_ends_at_its_stop_its_limit_or_the_end_of_the_text() -> None:
    model = load_small(bundled_model("tiny-llama"))
    (free,) = Writer(model, unchanged).write(prompts(model, 24)[:1])
    text = model.tokenizer.decode(free)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    cut, short = Writer(model, unchanged).write([*prompts(model, 24, stop)[:1], *prompts(model, 5)[:1]])
    assert short == free[:5]
    assert cut == free[: len(cut)]
    assert stop in model.tokenizer.decode(cut)
    assert stop not in model.tokenizer.decode(cut[:-1])
    writer = Writer(model, unchanged)
    writer.ends = {free[3]}
    assert writer.write(prompts(model, 24)[:1]) == [free[: free.index(free[3]) + 1]]


def test_batches_change_nothing_and_references_are_cached(tmp_path: Path) -> None:
    model = load_small(bundled_model("tiny-llama"))
    asked = [*prompts(model, 8), *prompts(model, 12)]
    whole, origin = write_answers(model, asked, Variant(unchanged), 10**6, NO_CACHE, lambda _: lambda: None)
    assert origin is None
    steps: list[int] = []
    cache = ContentCache(tmp_path, {}, {"run": "first"})
    for _ in range(2):
        found, origin = write_answers(
            model, asked, Variant(unchanged, "float"), 40, cache, lambda count: lambda: steps.append(count)
        )
        assert found == whole
    assert origin == {"run": "first"}
    assert len(steps) == steps[0] > 2


def test_a_model_without_room_is_refused_before_its_blocks_are_read() -> None:
    check_room(load_small(bundled_model("tiny-llama")))
    wide = {"hidden_size": 65536, "intermediate_size": 65536, "num_attention_heads": 64, "vocab_size": 16}
    shape = SHAPES["llama"] | wide | {"num_key_value_heads": 64, "num_hidden_layers": 100}  # 10 TiB in float32
    settings = ModelSettings(name="giant", weights="random", architecture=shape, seqlen=32)
    with pytest.raises(ResourceError, match="need all blocks of the model at once"):
        check_room(load(settings, None, torch.device("cpu"), seed=0))


def test_the_harness_gets_text_cut_at_its_stops() -> None:
    model = load_small(bundled_model("tiny-llama"))
    lm = BlockLM(model.tokenizer, 64, lambda pairs: pytest.fail("not asked"), Writer(model, unchanged).write)
    expected = generated(bundled_model("tiny-llama"), prompts(model, 16))
    texts = [model.tokenizer.decode(answer, skip_special_tokens=True) for answer in expected]
    asked = [request("generate_until", text, {"until": [" the"], "max_gen_toks": 16}) for text in TEXTS]
    assert lm.generate_until(asked) == [text.split(" the")[0] for text in texts]
    long = request("generate_until", "The river. " * 60, {"until": [], "max_gen_toks": 16})
    assert len(lm._prompt(*long.args).tokens) == 64 - 16
    with pytest.raises(InputError, match="an answer of 64 tokens has no place in a model of 64 positions"):
        lm.generate_until([request("generate_until", "A", {"until": [], "max_gen_toks": 64})])


def write_rows(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings_of(task: str, file: Path) -> EvalSettings:
    return parse(compose_run("eval=none", f"eval.tasks=[{task}]", f"eval.tasks_local.{task}={file}")).eval


@pytest.mark.slow
def test_gsm8k_and_a_task_of_ones_own_are_measured_from_local_files(tmp_path: Path) -> None:
    model = load_small(bundled_model("tiny-llama"))
    gsm = write_rows(
        tmp_path / "gsm.jsonl", [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(3)]
    )
    asked = [Prompt(tuple(model.tokenizer.encode(text)), ("\n",), 64) for text in TEXTS]
    lines = [model.tokenizer.decode(a).split("\n")[0] for a in Writer(model, unchanged).write(asked)]
    rows = [{"query": text, "answer": line.strip()} for text, line in zip(TEXTS, lines, strict=True)]
    rows[-1]["answer"] = "something else"
    own = write_rows(tmp_path / "own.jsonl", rows)  # type: ignore[arg-type]
    record = run(
        compose_run(
            "model=tiny-llama",
            "method=rtn",
            "quant=w4a16g128",
            "calib=none",
            "eval=none",
            "eval.tasks=[gsm8k,mine]",
            f"eval.tasks_local.gsm8k={gsm}",
            f"eval.tasks_local.mine={own}",
            "tracker=none",
            f"paths.runs={tmp_path / 'runs'}",
        )
    )
    assert record.metrics["float/exact_match/mine"] == 0.75
    assert 0 <= record.metrics["exact_match/mine"] <= 1
    for name in ("strict-match", "flexible-extract"):
        assert 0 <= record.metrics[f"float/exact_match_{name}/gsm8k"] <= 1
    assert record.protocol["exact_match_strict-match/gsm8k"]["items"] == 3
    items = pandas.read_parquet(tmp_path / "runs" / record.run_id / "items.parquet")
    assert items[items["key"] == "float/exact_match/mine"].sort_values("item")["value"].tolist() == [1, 1, 1, 0]


def test_tasks_that_sample_are_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    (task,) = load_tasks(settings_of("gsm8k", file)).values()
    assert task.OUTPUT_TYPE == "generate_until"
    from lsiq.evals.tasks import _check

    task.set_config("generation_kwargs", {"do_sample": True})
    with pytest.raises(ConfigError, match="generated greedily here only"):
        _check("gsm8k", task)


def test_an_answer_longer_than_the_model_is_refused_before_blocks_are_quantised(
    checkpoints: dict[str, Path], small_run: Callable[..., DictConfig], tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"query": "The river is", "answer": "wide"}])
    words = ("eval.corpora=[]", "eval.tasks=[mine]", f"eval.tasks_local.mine={file}")
    with pytest.raises(InputError, match=r"256 tokens has no place in a model of 128 positions; leave out mine"):
        run(small_run(checkpoints["llama"], *words))
    assert list((tmp_path / "runs").glob("*/record.json"))
    assert not list((tmp_path / "runs").glob("*/blocks/*"))


def test_contexts_that_lose_their_beginning_are_counted_beforehand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, object]] = [{"query": text, "answer": "x"} for text in ("A", "The river. " * 300, "B")]
    tasks = load_tasks(settings_of("mine", write_rows(tmp_path / "rows.jsonl", rows)))
    model = load_small(bundled_model("tiny-llama"))
    check_tasks(model, tasks, 1)
    assert capsys.readouterr().err == ""
    check_tasks(model, tasks, None)
    assert "1 of 3 contexts of mine lose their beginning" in capsys.readouterr().err


IFEVAL: list[dict[str, object]] = [
    {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "instruction_id_list": ["length_constraints:number_sentences"],
        "kwargs": [{"num_sentences": 1, "relation": "at least"}],
    },
    {"instruction_id_list": ["startend:quotation"], "kwargs": [{}]},
]


def ifeval_rows(file: Path) -> Path:
    return write_rows(
        file, [{"key": n, "prompt": text, **row} for n, (text, row) in enumerate(zip(TEXTS, IFEVAL, strict=False))]
    )


@pytest.mark.parametrize("listed", [True, False])
def test_ifeval_without_its_packages_says_what_to_install(
    listed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the harness is imported, and of tasks that are not listed when the harness imports what it wants."""
    settings = settings_of("ifeval", ifeval_rows(tmp_path / "rows.jsonl"))
    for module in [module for module in sys.modules if module.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "langdetect", None)
    if not listed:
        monkeypatch.setattr("lsiq.evals.tasks._PACKAGES", {})
    for check in (task_names.check_tasks, load_tasks) if listed else (load_tasks,):
        with pytest.raises(ConfigError, match=r"ifeval needs langdetect.*pip install 'lm_eval\[ifeval\]'"):
            check(settings)


def test_ifeval_without_the_data_of_nltk_says_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    with pytest.raises(InputError, match=r"ifeval is scored with punkt_tab of nltk.*NLTK_DATA"):
        fetch_punkt("ifeval")


def test_a_row_that_lacks_a_field_of_the_hub_names_it(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"key": 1, "prompt": "Write.", "kwargs": []}])
    with pytest.raises(InputError, match=r"line 1: .*it lacks instruction_id_list"):
        read_rows(file, "ifeval")


@pytest.mark.slow
def test_ifeval_is_measured_from_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("langdetect")
    pytest.importorskip("immutabledict")
    import nltk

    punkt = tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english"  # one that knows no abbreviations
    punkt.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (punkt / name).write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    folder = save_model(SHAPES["llama"] | {"max_position_embeddings": 1400}, tmp_path / "model", std=0.3)
    model = load_small(folder)
    asked = [Prompt(tuple(model.tokenizer.encode(text)), (), 1280) for text in TEXTS[: len(IFEVAL)]]
    texts = [model.tokenizer.decode(a, skip_special_tokens=True) for a in Writer(model, unchanged).write(asked)]
    record = run(
        compose_run(
            f"model.path={folder}",
            "quant=fp16",
            "calib=none",
            "eval=none",
            "eval.tasks=[ifeval]",
            f"eval.tasks_local.ifeval={ifeval_rows(tmp_path / 'rows.jsonl')}",
            "tracker=none",
            f"paths.runs={tmp_path / 'runs'}",
        )
    )
    items = pandas.read_parquet(tmp_path / "runs" / record.run_id / "items.parquet")
    found = items[items["key"] == "prompt_level_strict_acc/ifeval"].sort_values("item")["value"].tolist()
    assert found == ["," not in texts[0], True, texts[2].strip()[0] == texts[2].strip()[-1] == '"']
    assert record.metrics["prompt_level_strict_acc/ifeval"] == pytest.approx(sum(found) / 3)
    assert record.protocol["inst_level_strict_acc/ifeval"]["items"] == 3
