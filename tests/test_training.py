"""Training changes the adapter and nothing else, learns through the states, and survives being interrupted."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal

import pytest
import torch
from naive_model import naive_run
from safetensors.torch import load_file
from tiny import listing, patched_model, save_checkpoint, tokens, write_jsonl

from deltamem_tool import DeltaMemConfig, DeltaMemError, dialogues, load, training
from deltamem_tool.adapter import WEIGHTS_FILE, read_adapter
from deltamem_tool.data import IGNORED
from deltamem_tool.dialogues import assistant, user
from deltamem_tool.errors import ArchitectureError, DataError
from deltamem_tool.recipe import DataOptions, Recipe, TrainingOptions
from deltamem_tool.surgery import adapter_of
from deltamem_tool.training import EpisodeModel, train

LOSS_TOLERANCE = 2e-5  # float32 against the float64 equations; the loss is about 5
SLOPE_TOLERANCE = 2e-3  # relative, of a derivative by central differences


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Six conversations, each with its own answer."""
    facts = [dialogues.Fact("dog", "Rex"), dialogues.Fact("house", "Oslo"), dialogues.Fact("car", "blue")]
    facts += [dialogues.Fact("sister", "Anna"), dialogues.Fact("exam", "noon"), dialogues.Fact("dinner", "soup")]
    talks = [[user(fact._say(dialogues.STATEMENTS[0])), assistant("Okay.")] for fact in facts]
    asked = [[user(fact._say(dialogues.QUESTIONS[0])), assistant(fact.answer)] for fact in facts]
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    return write_jsonl(path, [talk + question for talk, question in zip(talks, asked, strict=True)])


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


def episode_batch(scored=((3, 4), (2,), (4,))):
    """Two conversations with two and one exchanges; of unlike length, padded on the right."""
    write_ids, write_mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    read_ids, read_mask = tokens(3, 6, seed=1), torch.ones(3, 6, dtype=torch.long)
    write_mask[1, 4:], read_mask[1, 4:] = 0, 0
    labels = torch.full_like(read_ids, IGNORED)
    for row, columns in enumerate(scored):
        labels[row, list(columns)] = read_ids[row, list(columns)]
    batch = {"write_ids": write_ids, "write_mask": write_mask, "read_ids": read_ids, "read_mask": read_mask}
    return batch | {"labels": labels, "rows": torch.tensor([0, 0, 1])}


def naive_loss(model, batch) -> float:
    """Each history and exchange by itself, in float64, all logits, one scored token after the other."""
    losses = []
    for row, conversation in enumerate(batch["rows"].tolist()):
        history = batch["write_ids"][conversation][batch["write_mask"][conversation].bool()].tolist()
        exchange = batch["read_ids"][row][batch["read_mask"][row].bool()].tolist()
        _, states = naive_run(model, history)
        logits, after = naive_run(model, exchange, states, [False] * len(exchange))
        assert all(torch.equal(after[layer], state) for layer, state in states.items())
        for position, label in enumerate(batch["labels"][row].tolist()):
            if label != IGNORED:
                losses.append(-logits[position - 1].log_softmax(-1)[label].item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", ["qwen3", "llama", "smollm3"])
def test_the_loss_is_what_the_equations_say(name):
    model = patched_model(name, state_heads=2)
    batch = episode_batch()
    with torch.no_grad():
        loss = EpisodeModel(model)(**batch)["loss"]
    assert abs(loss.item() - naive_loss(model, batch)) < LOSS_TOLERANCE
    batch["rows"] = torch.tensor([0, 1, 1])  # whose memory is read decides
    with torch.no_grad():
        assert abs(EpisodeModel(model)(**batch)["loss"].item() - loss.item()) > 100 * LOSS_TOLERANCE


def test_gradients_are_the_slopes_of_the_equations():
    """Every tensor of the adapter, and its derivative: keys, values and gates act through the state alone."""
    model = patched_model(heads=("q", "k", "v", "o"))
    batch = episode_batch()
    adapter = adapter_of(model)
    EpisodeModel(model)(**batch)["loss"].backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-5, f"no gradient reaches {name}"
        if name.startswith("layers.1."):
            continue  # the slopes of one layer are enough to wait for
        direction = torch.randn(parameter.shape, generator=generator)
        direction *= parameter.grad.norm() / (parameter.grad * direction).sum().abs()  # so that the slope is not near 0
        step = 2e-3 / direction.norm()
        kept, losses = parameter.detach().clone(), []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.copy_(kept + sign * step * direction)
            losses.append(naive_loss(model, batch))
        with torch.no_grad():
            parameter.copy_(kept)
        slope, expected = (losses[0] - losses[1]) / (2 * step.item()), (parameter.grad * direction).sum().item()
        assert abs(slope - expected) < SLOPE_TOLERANCE * abs(expected) + 1e-4, f"{name}: {slope} is not {expected}"


def test_it_learns_and_only_the_adapter_changes(recipe, checkpoint, monkeypatch, tmp_path):
    models = []

    def watched(of):
        models.append(loaded(of))
        models.append({name: weight.clone() for name, weight in adapter_of(models[0][0]).state_dict().items()})
        return models[0]

    loaded = training._load_base
    monkeypatch.setattr(training, "_load_base", watched)
    reports = []
    fixed = make_recipe(checkpoint, recipe.out, path=recipe.data.path, steps=25, batch_size=6)
    result = train(fixed, report=lambda *said: reports.append(said))
    losses = [loss for _, loss in result.losses]
    assert [step for step, _ in result.losses] == list(range(1, 26))
    assert losses[-1] < 0.8 * losses[0]
    assert [said[:2] for said in reports] == [(step, 25) for step in range(1, 26)]
    (model, _), before = models
    kept = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(weight, kept[name]) for name, weight in model.state_dict().items() if name in kept)
    trained = adapter_of(model).state_dict()
    for name, weight in trained.items():
        assert not torch.equal(weight, before[name]), f"{name} did not learn"
    # What is written is what was trained, and nothing else is left.
    folder = read_adapter(recipe.out)
    assert all(torch.equal(folder.tensors[name], weight) for name, weight in trained.items())
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    assert folder.base.name == str(checkpoint) and result.parameters == folder.num_parameters()


@pytest.mark.parametrize("granularity", ["message", "sentence"])
def test_a_memory_that_writes_by_segments_learns_too(granularity, checkpoint, chats, tmp_path):
    memory = DeltaMemConfig(rank=4, state_heads=2, granularity=granularity)
    recipe = make_recipe(checkpoint, tmp_path / "adapter", path=str(chats), steps=25, batch_size=6)
    losses = [loss for _, loss in train(dataclasses.replace(recipe, memory=memory)).losses]
    assert losses[-1] < 0.8 * losses[0]
    assert read_adapter(recipe.out).config.granularity == granularity


def test_a_run_can_start_from_an_adapter(recipe, checkpoint, chats, tmp_path):
    train(recipe)
    second = Recipe(**{**vars(recipe), "adapter": recipe.out, "out": str(tmp_path / "second")})
    result = train(second)
    first_again = make_recipe(checkpoint, tmp_path / "other", path=str(chats), steps=12)
    assert result.losses[0][1] < train(first_again).losses[0][1]


@pytest.mark.parametrize("kind", ["generated", "file"])
def test_an_interrupted_run_goes_on_where_it_was(kind, checkpoint, chats, tmp_path):
    """Ctrl-C after step 3 of 8 keeps the adapter; resumed, the end is what it would have been, to the bit."""
    path = str(chats) if kind == "file" else None

    def recipe(out):
        return make_recipe(checkpoint, tmp_path / out, path=path, steps=8, batch_size=2)

    def interrupt(step, *_):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    whole = train(recipe("whole"))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(DeltaMemError) as stopped:
        train(recipe("parts"), report=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert "Interrupted after step 3 of 8" in stopped.value.what and "--resume" in stopped.value.next
    assert str(tmp_path / "parts") in stopped.value.why
    adapter_of(load(tmp_path / "parts"))
    half = load_file(tmp_path / "parts" / WEIGHTS_FILE)
    with pytest.raises(DeltaMemError, match="already there"):
        train(recipe("parts"))  # to start over would lose it
    resumed = train(recipe("parts"), resume=True)
    assert (resumed.steps, resumed.losses) == (8, whole.losses)
    expected, found = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("whole", "parts"))
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), f"{name} differs by {(found[name] - weight).abs().max()}"
        assert not torch.equal(half[name], weight)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "parts"}


def test_there_must_be_something_to_resume(recipe, tmp_path):
    with pytest.raises(DeltaMemError, match="nothing to resume"):
        train(recipe, resume=True)
    assert listing(tmp_path) == {}
    (tmp_path / "adapter.run" / "checkpoint-3").mkdir(parents=True)  # of a run that was killed while it saved
    with pytest.raises(DeltaMemError, match="nothing to resume"):
        train(recipe, resume=True)


def test_a_full_disk_leaves_no_half_checkpoint(checkpoint, chats, tmp_path, monkeypatch):
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
    with pytest.raises(DataError, match="bad.jsonl:1"):
        train(wrong)
    assert listing(tmp_path) == before
    bare = save_checkpoint(tmp_path / "bare")  # a model without a tokenizer
    before = listing(tmp_path)
    with pytest.raises(ArchitectureError, match="tokenizer"):
        train(make_recipe(bare, tmp_path / "adapter", path=recipe.data.path))
    assert listing(tmp_path) == before


def test_another_recipe_cannot_resume(recipe, checkpoint, chats, tmp_path):
    def interrupt(step, *_):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(DeltaMemError, match="Interrupted"):
        train(recipe, report=interrupt)
    other = Recipe(**{**vars(recipe), "memory": DeltaMemConfig(rank=8)})
    before = (tmp_path / "adapter" / WEIGHTS_FILE).read_bytes()
    with pytest.raises(DeltaMemError, match="(?s)another recipe.*rank"):
        train(other, resume=True)
    assert (tmp_path / "adapter" / WEIGHTS_FILE).read_bytes() == before
    said = json.loads((tmp_path / "adapter" / "deltamem_config.json").read_text())
    assert said["mechanism"]["rank"] == 4


@pytest.mark.parametrize("nothing", [float("nan"), float("inf")])
def test_a_diverged_run_does_not_replace_a_good_one(recipe, monkeypatch, tmp_path, nothing):
    train(recipe)
    before, content = listing(tmp_path), (tmp_path / "adapter" / WEIGHTS_FILE).read_bytes()
    forward, calls = EpisodeModel.forward, []

    @functools.wraps(forward)  # the Trainer looks at the signature
    def diverging(self, **batch):
        calls.append(batch)
        return {"loss": forward(self, **batch)["loss"] * (nothing if len(calls) == 3 else 1)}

    monkeypatch.setattr(EpisodeModel, "forward", diverging)
    with pytest.raises(DeltaMemError, match=r"(?s)loss of step 3 is (nan|inf).*lower training.learning_rate"):
        train(recipe, overwrite=True)
    assert listing(tmp_path) == before and (tmp_path / "adapter" / WEIGHTS_FILE).read_bytes() == content


def test_a_slash_at_the_end_of_out_does_not_matter(checkpoint, chats, tmp_path):
    train(make_recipe(checkpoint, f"{tmp_path}/adapter/", path=str(chats), steps=1))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_a_run_has_one_device(recipe, monkeypatch, tmp_path):
    """With more GPUs the Trainer would copy what it knows of the model to each, and not the base."""

    class OnTwo(training.TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    monkeypatch.setattr(training, "TrainingArguments", OnTwo)
    assert OnTwo(output_dir=str(tmp_path)).n_gpu == 2
    assert training._arguments(recipe.training, tmp_path).n_gpu == 1


def test_losses_that_are_none_are_reported_as_they_are(recipe, tmp_path):
    assert training._arguments(recipe.training, tmp_path).logging_nan_inf_filter is False


def test_the_recipe_decides_the_revision_of_an_adapters_base(recipe, monkeypatch):
    train(recipe)
    asked = []
    monkeypatch.setattr(training, "load", lambda path, **options: asked.append(options) or load(path))
    training._load_base(Recipe(**{**vars(recipe), "adapter": recipe.out, "revision": "v2"}))
    assert asked == [{"base": recipe.base, "base_revision": "v2"}]


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


def test_checkpoints_of_an_unfinished_run_are_not_thrown_away(recipe):
    state = training.Path(f"{recipe.out}.run") / "checkpoint-3" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text('{"global_step": 3}')
    with pytest.raises(DeltaMemError, match="--resume"):
        train(recipe)
    assert state.is_file()
