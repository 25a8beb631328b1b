"""Training changes only the adapter, learns through the states, and survives interruption."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers.tiny import listing, save_checkpoint, weights_of, write_jsonl
from safetensors.torch import load_file

from deltamem_tool import DeltaMemConfig, DeltaMemError, load
from deltamem_tool.adapter.config_file import WEIGHTS_FILE
from deltamem_tool.adapter.folder import read_adapter
from deltamem_tool.data import dialogues
from deltamem_tool.data.dialogues import assistant, user
from deltamem_tool.errors import ArchitectureError, ConfigError, DataError
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.recipe.load import DataOptions, Recipe, TrainingOptions
from deltamem_tool.training import EpisodeModel, arguments, run, train
from deltamem_tool.training.arguments import training_arguments
from deltamem_tool.training.run_folder import open_run_folder, run_folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Six conversations, each with its own answer."""
    facts = [dialogues.Fact("dog", "Rex"), dialogues.Fact("house", "Oslo"), dialogues.Fact("car", "blue")]
    facts += [dialogues.Fact("sister", "Anna"), dialogues.Fact("exam", "noon"), dialogues.Fact("dinner", "soup")]
    talks = [[user(fact.say(dialogues.STATEMENTS[0])), assistant("Okay.")] for fact in facts]
    questions = [[user(fact.say(dialogues.QUESTIONS[0])), assistant(fact.answer)] for fact in facts]
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    return write_jsonl(path, [talk + question for talk, question in zip(talks, questions, strict=True)])


@pytest.fixture
def recipe(checkpoint, chats, tmp_path):
    return make_recipe(checkpoint, tmp_path / "adapter", path=str(chats))


def make_recipe(base, out, path=None, **options):
    usual = {"steps": 6, "batch_size": 3, "learning_rate": 2e-2, "save_every": 100}
    return Recipe(
        base=str(base),
        out=str(out),
        memory=DeltaMemConfig(rank=4, state_heads=2),
        data=DataOptions(path=path, facts_first=1, facts_last=2, max_write_tokens=200, max_read_tokens=60),
        training=TrainingOptions(**usual | options),
    )


def test_training_reduces_the_loss_and_changes_only_the_adapter(recipe, checkpoint, monkeypatch, tmp_path):
    models = []

    def watched(*of):
        models.append(loaded(*of))
        models.append({name: weight.clone() for name, weight in adapter_of(models[0][0]).state_dict().items()})
        return models[0]

    loaded = run.load_base
    monkeypatch.setattr(run, "load_base", watched)
    reports = []
    fixed = make_recipe(checkpoint, recipe.out, path=recipe.data.path, steps=25, batch_size=6)
    result = train(fixed, report=lambda *report: reports.append(report))
    losses = [loss for _, loss in result.losses]
    assert [step for step, _ in result.losses] == list(range(1, 26))
    assert losses[-1] < 0.8 * losses[0]
    assert [report[:2] for report in reports] == [(step, 25) for step in range(1, 26)]
    (model, _), before = models
    weights = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items() if name in weights)
    trained = adapter_of(model).state_dict()
    for name, weight in trained.items():
        assert not torch.equal(weight, before[name]), f"{name} did not learn"
    # What is written is what was trained, and nothing else is left.
    folder = read_adapter(recipe.out)
    assert all(torch.equal(weights_of(folder)[name], weight) for name, weight in trained.items())
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    assert folder.base.name == str(checkpoint) and result.parameters == folder.num_parameters()


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["message", "sentence"])
def test_a_memory_that_writes_by_segments_learns(granularity, checkpoint, chats, tmp_path):
    memory = DeltaMemConfig(rank=4, state_heads=2, granularity=granularity)
    recipe = make_recipe(checkpoint, tmp_path / "adapter", path=str(chats), steps=25, batch_size=6)
    losses = [loss for _, loss in train(dataclasses.replace(recipe, memory=memory)).losses]
    assert losses[-1] < 0.8 * losses[0]
    assert read_adapter(recipe.out).config.granularity == granularity


@pytest.mark.slow
def test_a_run_can_start_from_an_adapter(recipe, checkpoint, chats, tmp_path):
    train(recipe)
    second = Recipe(**{**vars(recipe), "adapter": recipe.out, "out": str(tmp_path / "second")})
    result = train(second)
    first_again = make_recipe(checkpoint, tmp_path / "other", path=str(chats), steps=12)
    assert result.losses[0][1] < train(first_again).losses[0][1]


def test_a_folder_created_at_out_during_the_run_is_kept(checkpoint, tmp_path):
    def make_thesis(step, *_):
        if step == 1:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis").write_text("theirs")

    with pytest.raises(DeltaMemError, match=r"out was created while this command was running\.[\s\S]*out-2"):
        train(make_recipe(checkpoint, tmp_path / "out", steps=2), report=make_thesis)
    assert (tmp_path / "out" / "thesis").read_text() == "theirs" and len(list((tmp_path / "out").iterdir())) == 1
    adapter_of(load(tmp_path / "out-2"))
    assert not (tmp_path / "out.run").exists()


def test_a_run_interrupted_before_its_first_step_leaves_nothing(checkpoint, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = listing(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(make_recipe(checkpoint, tmp_path / "out", steps=2), expecting=interrupt)
    assert listing(tmp_path) == before


def test_a_second_run_in_the_same_folder_raises(checkpoint, tmp_path):
    recipe, refused = make_recipe(checkpoint, tmp_path / "out", steps=2, save_every=1), []

    def start_again(step, *_):
        try:
            with open_run_folder(run_folder(recipe.out), {}, resume=False):
                raise AssertionError("two runs write to one folder")
        except DeltaMemError as error:
            refused.append(error.what)

    train(recipe, report=start_again)
    assert len(refused) == 2 and "Another program is writing" in refused[0]
    adapter_of(load(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "number"), [("generated", signal.SIGINT), ("file", signal.SIGTERM)])
def test_an_interrupted_run_resumes_bit_for_bit(kind, number, checkpoint, chats, tmp_path):
    """A signal after step 3 of 8 keeps the adapter; resumed, the end is what it would have been, to the bit."""
    path = str(chats) if kind == "file" else None

    def recipe(out):
        return make_recipe(checkpoint, tmp_path / out, path=path, steps=8, batch_size=2)

    def interrupt(step, *_):
        if step == 2:
            os.kill(os.getpid(), number)

    whole = train(recipe("whole"))
    handler = signal.getsignal(number)
    with pytest.raises(DeltaMemError) as stopped:
        train(recipe("parts"), report=interrupt)
    assert signal.getsignal(number) is handler
    assert "Interrupted after step 3 of 8" in stopped.value.what and "--resume" in stopped.value.next
    assert str(tmp_path / "parts") in stopped.value.why
    adapter_of(load(tmp_path / "parts"))
    half = load_file(tmp_path / "parts" / WEIGHTS_FILE)
    with pytest.raises(DeltaMemError, match="already exists"):
        train(recipe("parts"))  # to start over would lose it
    resumed = train(recipe("parts"), resume=True)
    assert (resumed.steps, resumed.losses) == (8, whole.losses)
    expected, weights = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("whole", "parts"))
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), f"{name} differs by {(weights[name] - weight).abs().max()}"
        assert not torch.equal(half[name], weight)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "parts"}


def test_resuming_without_a_run_raises(recipe, tmp_path):
    with pytest.raises(DeltaMemError, match="nothing to resume"):
        train(recipe, resume=True)
    assert listing(tmp_path) == {}
    (tmp_path / "adapter.run" / "checkpoint-3").mkdir(parents=True)  # of a run that was killed while it saved
    with pytest.raises(DeltaMemError, match="nothing to resume"):
        train(recipe, resume=True)


@pytest.mark.slow
def test_a_full_disk_leaves_no_partial_checkpoint(checkpoint, chats, tmp_path, monkeypatch):
    """The second checkpoint fails half-way: the first is what --resume finds."""
    recipe = make_recipe(checkpoint, tmp_path / "adapter", path=str(chats), save_every=2)
    real, saves = torch.save, []

    def full(content, path, *args, **options):
        saves.append(path)
        real(content, path, *args, **options)
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        train(recipe)
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "adapter.run").iterdir()} == {"checkpoint-2", "recipe.json"}
    assert not (tmp_path / "adapter").exists()
    assert train(recipe, resume=True).steps == 6


def test_a_failure_before_the_first_step_leaves_nothing(recipe, checkpoint, tokenizer, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    wrong = make_recipe(checkpoint, tmp_path / "adapter", path=str(tmp_path / "bad.jsonl"))
    before = listing(tmp_path)
    with pytest.raises(DataError, match=r"bad.jsonl:1"):
        train(wrong)
    assert listing(tmp_path) == before
    bare = save_checkpoint(tmp_path / "bare")  # a model without a tokenizer
    before = listing(tmp_path)
    with pytest.raises(ArchitectureError, match="tokenizer"):
        train(make_recipe(bare, tmp_path / "adapter", path=recipe.data.path))
    assert listing(tmp_path) == before


def test_resuming_with_another_recipe_raises(recipe, checkpoint, chats, tmp_path):
    def interrupt(step, *_):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(DeltaMemError, match="Interrupted"):
        train(recipe, report=interrupt)
    other = Recipe(**{**vars(recipe), "memory": DeltaMemConfig(rank=8)})
    before = (tmp_path / "adapter" / WEIGHTS_FILE).read_bytes()
    with pytest.raises(DeltaMemError, match=r"(?s)started with other settings.*rank"):
        train(other, resume=True)
    assert (tmp_path / "adapter" / WEIGHTS_FILE).read_bytes() == before
    config = json.loads((tmp_path / "adapter" / "deltamem_config.json").read_text())
    assert config["mechanism"]["rank"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("nothing", [float("nan"), float("inf")])
def test_a_diverged_run_does_not_replace_a_good_one(recipe, monkeypatch, tmp_path, nothing):
    train(recipe)
    before, content = listing(tmp_path), (tmp_path / "adapter" / WEIGHTS_FILE).read_bytes()
    forward, calls = EpisodeModel.forward, []

    @functools.wraps(forward)  # the Trainer looks at the signature
    def diverging(self, **batch):
        calls.append(batch)
        output = forward(self, **batch)
        return {**output, "loss": output["loss"] * (nothing if len(calls) == 3 else 1)}

    monkeypatch.setattr(EpisodeModel, "forward", diverging)
    with pytest.raises(DeltaMemError, match=r"(?s)loss of step 3 is (nan|inf).*lower training.learning_rate"):
        train(recipe, overwrite=True)
    assert listing(tmp_path) == before and (tmp_path / "adapter" / WEIGHTS_FILE).read_bytes() == content


@pytest.mark.parametrize(
    ("options", "key", "why"),
    [
        ({"scheduler": "reduce_lr_on_plateau"}, "training", "requires an eval strategy"),
        ({"scheduler": "cosine_with_min_lr"}, "training.scheduler_options", "min_lr"),
        ({"scheduler_options": {"x": 1}}, "training.scheduler_options", "'x'"),
        (
            {"scheduler": "cosine_with_restarts", "scheduler_options": {"num_cycles": "x"}},
            "training.scheduler_options",
            "",
        ),
        ({"optimizer_options": "x"}, "training.optimizer_options", "unpack"),
        ({"optimizer_options": "momentum=0.5"}, "training.optimizer_options", "takes none of momentum=0.5"),
    ],
)
def test_options_that_transformers_rejects_raise(checkpoint, chats, tmp_path, options, key, why):
    with pytest.raises(ConfigError, match=f"under {key} are invalid") as refused:
        train(make_recipe(checkpoint, tmp_path / "adapter", path=str(chats), **options))
    assert why in refused.value.why
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["learning_rate", "weight_decay", "max_grad_norm"])
def test_numbers_that_overflow_in_float32_raise(key):
    with pytest.raises(ConfigError, match=f"{key} must be 1e\\+30 or less"):
        TrainingOptions(**{key: 1e300})


def test_a_slash_at_the_end_of_out_does_not_matter(checkpoint, chats, tmp_path):
    train(make_recipe(checkpoint, f"{tmp_path}/adapter/", path=str(chats), steps=1))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_a_run_uses_one_device(recipe, monkeypatch, tmp_path):
    """With more GPUs, the Trainer would copy the module that it knows to each of them, but not the base."""

    class OnTwo(arguments.TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    monkeypatch.setattr(arguments, "TrainingArguments", OnTwo)
    assert OnTwo(output_dir=str(tmp_path)).n_gpu == 2
    assert training_arguments(recipe.training, 6, tmp_path).n_gpu == 1


def test_nan_losses_are_not_filtered(recipe, tmp_path):
    assert training_arguments(recipe.training, 6, tmp_path).logging_nan_inf_filter is False


def test_the_recipe_sets_the_revision_of_an_adapters_base(recipe, monkeypatch):
    train(recipe)
    revisions = []
    monkeypatch.setattr(run, "load", lambda path, **options: revisions.append(options) or load(path))
    monkeypatch.setattr(run, "check_revision", lambda *_: None)  # a folder stands for the Hub's
    run.load_base(Recipe(**{**vars(recipe), "adapter": recipe.out, "revision": "v2"}))
    assert [(options["base"], options["base_revision"]) for options in revisions] == [(recipe.base, "v2")]


def test_data_is_checked_before_the_first_step(recipe, checkpoint, tmp_path):
    chats = write_jsonl(
        tmp_path / "chats.jsonl",
        [[user("a"), assistant("b"), user("c"), assistant("d" * n)] for n in (1, 1, 1, 1, 1, 1, 1, 200)],
    )
    steps = []
    with pytest.raises(DataError, match=r"chats.jsonl:8: .*max_read_tokens = 60"):
        train(
            make_recipe(checkpoint, recipe.out, path=str(chats), steps=1, batch_size=1),
            report=lambda *said: steps.append(said),
        )
    assert steps == [] and set(listing(tmp_path)) == {"chats.jsonl"}


def test_checkpoints_of_an_unfinished_run_are_not_deleted(recipe):
    state = Path(f"{recipe.out}.run") / "checkpoint-3" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text('{"global_step": 3}')
    with pytest.raises(DeltaMemError, match="--resume"):
        train(recipe)
    assert state.is_file()
