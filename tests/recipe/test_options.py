"""Invalid options of a recipe, and invalid combinations of options, are named."""

from __future__ import annotations

import pytest

from deltamem_tool.data import dialogues
from deltamem_tool.errors import ConfigError
from deltamem_tool.recipe.load import load_recipe


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("trainig.steps=3", r"trainig is not known.*mean training\?"),
        ("training.step=3", r"training.step is not known.*mean training.steps\?"),
        ("data.max_write=3", r"data.max_write is not known.*data.max_write_tokens"),
        ("memory.rnk=3", r"memory.rnk is not known.*memory.rank\?"),
        ("xyzzy=3", "xyzzy is not known.*the known keys are base, out"),
        ("steps=3", r"steps is not known.*training.steps"),
        ("training.steps=many", "training.steps must be a whole number, not 'many'"),
        ("training.steps=1.5", "training.steps must be a whole number, not 1.5"),
        ("training.steps=true", "training.steps must be a whole number, not true"),
        ("training.learning_rate=fast", "training.learning_rate must be a number"),
        ("training.learning_rate=.inf", "training.learning_rate must be a finite number"),
        ("base=7", "base must be text, not 7"),
        ("data.path=[a]", "data.path must be"),
        ("training=fast", "training must be a mapping"),
        ("memory=null", "memory must be a mapping"),
        ("base.name=a", "base is not a mapping"),
        ("training.steps", "not key=value"),
        ("training.steps=[", "not YAML|no YAML"),
        ("memory.rank=0", "memory.rank must be 1 or more, not 0"),
        ("memory.rank=65", "memory.rank must be 64 or less, not 65"),
        ("memory.rank=four", "memory.rank must be a whole number, not 'four'"),
        ("memory.branches=5", "branches must be a list"),
        ("memory.branches=q,o", "memory.branches must be a list, not 'q,o'"),
        ("memory.branches=[q, q]", "names 'q' twice"),
        ("memory.branches=[x]", "branches has 'x'"),
        ("memory.branches=[[q]]", "entry 1 of memory.branches must be text"),
        ("memory.layers=3", "layers must be 'all'"),
        ("memory.layers=[]", "memory.layers must not be an empty list"),
        ("memory.layers=[-1]", "indices from 0"),
        ("memory.alpha=.nan", "memory.alpha must be a finite number, not nan"),
        ("memory.alpha=.inf", "memory.alpha must be a finite number, not inf"),
        (
            "memory.update_rule=strange",
            "memory.update_rule must be 'standard', 'lambda_outside' or",
        ),
        ("training.steps=0", "training.steps must be 1 or more"),
        ("training.warmup=1.0", "training.warmup"),
        ("training.scheduler=cosinus", "training.scheduler.*cosine"),
        ("data.facts_first=9", "data.facts_first"),
        ("data.facts_last=41", "data.facts_last"),
        ("data.max_write_tokens=0", "data.max_write_tokens"),
        ("data.max_read_tokens=-1", "data.max_read_tokens"),
        ("data.growth=2", "data.growth must be 1 or less, not 2"),
        ("data.unanswerable=1", "data.unanswerable must be below 1, not 1"),
        ("training.steps='3'", "training.steps must be a whole number, not '3'"),
        ("training.steps=3.0", "training.steps must be a whole number, not 3.0"),
        ("training.learning_rate='2e-4'", "training.learning_rate must be a number"),
        ("training.learning_rate=true", "training.learning_rate must be a number, not true"),
        ("training.learning_rate=.nan", "training.learning_rate must be a finite number"),
        ("training.learning_rate=0", "training.learning_rate must be above 0"),
        ("training.step=3", r"training.step is not known: did you mean training.steps\?"),
        ("batchsize=3", r"batchsize is not known: did you mean training.batch_size\?"),
        ("data.batch_size=3", r"data.batch_size is not known: did you mean training.batch_size\?"),
        ("training.epochs=1", "cannot be combined"),
        ("training.epochs=0", "training.epochs must be above 0"),
        ("training.bptt=2", "give training.write_chunk"),
        ("training.early_stop=2", "give training.eval_every"),
        ("training.quantize=int4", "training.quantize must be 'none', 'int8' or 'nf4', not 'int4'"),
        ("training.dtype=null", "training.dtype must be"),
        ("training.optimizer=adam", "training.optimizer must be a name that transformers knows, not 'adam'"),
        ("training.report_to=[tensorbord]", r"entry 1 of training.report_to.*tensorboard\?"),
        ("training.report_to=wandb", "training.report_to must be a list"),
        ("training.scheduler_options=3", "training.scheduler_options must be a mapping"),
        ("training.scheduler_options={a: [1]}", "training.scheduler_options has 'a'"),
        ("training.gradient_checkpointing=1", "training.gradient_checkpointing must be true or false, not 1"),
        ("training.seed=-1", "training.seed must be 0 or more"),
        ("training.write_chunk=0", "training.write_chunk must be 1 or more"),
        ("data.supervise=first", "data.supervise must be 'last' or 'all'"),
        ("data.split=", "data.split must be text, not null"),
        ("data.recent_turns=-1", "data.recent_turns must be 0 or more"),
        ("data.skip_bad_rows='yes'", "data.skip_bad_rows must be true or false"),
        ("data.mix=1", "data.mix must be below 1"),
        ("data={mix: 0.5, generated: facts}", "data.mix is the share of generated episodes among your own"),
        ("data={path: a, mix: 0.5, group_by_length: true}", "leave out data.group_by_length or data.mix"),
        ("data.generated=facts", "with data.path, nothing is generated: give data.mix"),
        ("data.generated=talks", "data.generated must be 'dialogues' or 'facts'"),
        ("data.bare_first=0.5", "data.bare_first applies to natural facts: give data.generated: facts"),
        ("data.system=''", "data.system applies to natural facts"),
        ("data.chats_from=0.7", "data.chats_from must not be greater than data.chats_until"),
        ("data.talk_last=-1", "data.talk_last must be 0 or more"),
        ("data={path: null, path: x}", "path is given more than once"),
        ("objective.write_target=1.5", "objective.write_target must be 1 or less"),
        ("objective.write_sparsity=-1", "objective.write_sparsity must be 0 or more"),
        ("objective.context_dropout=0.2", "data.recent_turns must be 1 or more"),
        ("lora={}", "a memory or a LoRA"),
        ("lora.targets=[]", "lora.targets must not be empty"),
        ("lora.targets=[q_proj, 5]", "entry 2 of lora.targets must be text, not 5"),
        ("lora.dropout=1", "lora.dropout must be below 1"),
        ("out=''", "out must not be empty"),
    ],
)
def test_invalid_options_are_named(recipe, change, says):
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        load_recipe(recipe, [change])


@pytest.mark.parametrize("option", ["split=dev", "revision=main", "skip_bad_rows=true", "supervise=all"])
def test_options_of_own_conversations_need_a_path(recipe, option):
    assert load_recipe(recipe, [f"data.{option}"])
    generated = ["data.path=null", "training.steps=1", "training.epochs=null"]
    with pytest.raises(ConfigError, match=rf"data\.{option.partition('=')[0]} applies to your own conversations"):
        load_recipe(recipe, [*generated, f"data.{option}"])


def test_there_are_at_most_as_many_facts_as_attributes(recipe):
    most = len(dialogues.KIND_OF)
    assert load_recipe(recipe, [f"data.facts_last={most}"]).data.facts_last == most
    with pytest.raises(ConfigError, match=f"must be {most} or less"):
        load_recipe(recipe, [f"data.facts_last={most + 1}"])


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_unanswerable_questions_need_an_attribute_that_was_not_told(recipe, share):
    most = len(dialogues.KIND_OF)
    changes = ["data.path=null", "training.steps=1", "training.epochs=null", f"data.unanswerable={share}"]
    assert load_recipe(recipe, [*changes, f"data.facts_last={most - 1}"]).data.facts_last == most - 1
    if share:
        with pytest.raises(ConfigError, match=r"data\.facts_last leaves none for a question"):
            load_recipe(recipe, [*changes, f"data.facts_last={most}"])
    else:
        assert load_recipe(recipe, [*changes, f"data.facts_last={most}"]).data.facts_last == most
