"""Checkpoints as people have them: a memory patched onto what is on disk is the one attached to the model in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import peft
import pytest
import torch
from cli.command import deltamem  # noqa: F401
from safetensors.torch import load_file, save_file
from tiny import listing, randomise, save_checkpoint, tiny_config, tiny_model, tokens
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config

from deltamem_tool import DeltaMemConfig, MemoryCache, attach, detach, load, save_adapter
from deltamem_tool.adapter import create_adapter, read_adapter
from deltamem_tool.errors import ArchitectureError, ConfigError
from deltamem_tool.surgery import adapter_of

CONFIG = DeltaMemConfig(rank=4, heads=("q", "o"), delta_init="base_slice")


def as_bin(model, folder: Path, pieces: int = 1, zipped: bool = True) -> Path:
    """What people saved before safetensors."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    weights = dict(model.state_dict())
    if pieces == 1:
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return folder
    names = {f"pytorch_model-{i + 1:05d}-of-{pieces:05d}.bin": list(weights)[i::pieces] for i in range(pieces)}
    for file, own in names.items():
        torch.save({name: weights[name] for name in own}, folder / file, _use_new_zipfile_serialization=zipped)
    index = {"metadata": {}, "weight_map": {name: file for file, own in names.items() for name in own}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def in_pieces(model, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def whole(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


FORMS = {
    "safetensors": whole,
    "sharded": in_pieces,
    "bin": as_bin,
    "sharded bin": lambda model, folder: as_bin(model, folder, pieces=3),
    "bin of old torch": lambda model, folder: as_bin(model, folder, zipped=False),
}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens(2, 9)).logits


def assert_patched_is_attached(model, base: Path, out: Path, **options) -> None:
    """`deltamem patch` and `load` give what `attach` gives on `model`, bit by bit, and what `save_adapter` saves."""
    torch.manual_seed(7)
    folder = create_adapter(str(base), CONFIG, out, **options)
    torch.manual_seed(7)
    attach(model, CONFIG)
    assert all(torch.equal(folder.tensors[name], own) for name, own in adapter_of(model).state_dict().items())
    loaded = load(out, **options)
    assert loaded.dtype == model.dtype
    plain = logits(model)
    assert torch.equal(logits(loaded), plain)
    for each in (model, loaded):
        randomise(adapter_of(each))
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(model), plain)
    save_adapter(model, out, overwrite=True)  # its base is in memory alone
    assert torch.equal(logits(load(out, base=str(base), **options)), logits(model))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_form_and_dtype(form, dtype, tmp_path):
    # Made in that dtype: `.to(dtype)` would round the rotary frequencies too, which no checkpoint does.
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(), dtype=dtype).eval()
    assert_patched_is_attached(model, FORMS[form](model, tmp_path / "base"), tmp_path / "adapter")


@pytest.mark.parametrize("form", FORMS)
def test_tied_embeddings(form, tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    base = FORMS[form](model, tmp_path / "base")
    if form == "safetensors":
        assert "lm_head.weight" not in load_file(base / "model.safetensors")
    assert_patched_is_attached(model, base, tmp_path / "adapter")


def test_names_without_the_prefix(tmp_path):
    """As in `gpt2` on the Hub, which was saved as a model without head."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config).eval()
    base = whole(model, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({name.removeprefix("transformer."): w for name, w in weights.items()}, base / "model.safetensors")
    assert_patched_is_attached(model, base, tmp_path / "adapter")


def test_one_file_goes_before_an_index(tmp_path):
    """As in transformers: what is looked at is what is loaded."""
    whole(tiny_model(seed=1), in_pieces(tiny_model(seed=0), tmp_path / "pieces"))
    base = in_pieces(tiny_model(seed=0), tmp_path / "base")
    index = base / "model.safetensors.index.json"
    kept = index.read_text()
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(base / "model.safetensors")
    index.write_text(kept)
    as_bin(tiny_model(seed=2), base)
    assert_patched_is_attached(tiny_model(seed=1), base, tmp_path / "adapter")


# Memory

_MEASURE = """
import re, sys
from pathlib import Path
from transformers import AutoModelForCausalLM
from deltamem_tool import DeltaMemConfig
from deltamem_tool.adapter import create_adapter

def peak():  # not ru_maxrss, which a child inherits from the process that started it
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

small, large, out = sys.argv[1:]
config = DeltaMemConfig(delta_init="base_slice")
create_adapter(small, config, out + "/small-adapter")  # everything is imported and warm
before = peak()
create_adapter(large, config, out + "/large-adapter")
patched = peak()
sum(tensor.sum() for tensor in AutoModelForCausalLM.from_pretrained(large).state_dict().values())
print(patched - before, peak() - before)
"""


def test_patching_torch_files_needs_little_memory(tmp_path):
    """Four files of 48 MiB, half of it attention; `test_adapter` has the same for safetensors."""
    sizes = {"hidden_size": 1024, "intermediate_size": 16, "num_attention_heads": 16, "head_dim": 256}
    config = tiny_config(**sizes, num_key_value_heads=1, num_hidden_layers=6, vocab_size=1024)
    model = AutoModelForCausalLM.from_config(config)
    as_bin(model, tmp_path / "large", pieces=4)
    stored = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.bin"))
    assert stored > 180 * 2**20
    del model
    as_bin(tiny_model(hidden_size=64), tmp_path / "small")
    command = [sys.executable, "-c", _MEASURE, *(str(tmp_path / name) for name in ("small", "large", "."))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    patching, loading = (int(part) for part in done.stdout.split())
    assert loading > stored * 0.9, "the meter does not see what is read"
    assert patching < stored / 4, f"{patching / 2**20:.0f} of {stored / 2**20:.0f} MiB"


# Code in the checkpoint

_CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import Qwen3Config, Qwen3ForCausalLM

class OwnConfig(Qwen3Config):
    model_type = "own_model_of_this_test"

class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A checkpoint whose architecture is a Python file of its own; and the file that appears when that file runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = save_checkpoint(tmp_path / "base")
    (base / "own_code.py").write_text(_CODE.format(marker=str(tmp_path / "ran")))
    said = json.loads((base / "config.json").read_text())
    said |= {
        "model_type": "own_model_of_this_test",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"},
    }
    (base / "config.json").write_text(json.dumps(said))
    return base, tmp_path / "ran"


def test_code_runs_on_the_users_word_alone(with_code, tmp_path, deltamem):  # noqa: F811
    base, ran = with_code
    before = listing(tmp_path)
    done = deltamem("patch", base, "--out", tmp_path / "adapter")
    done.assert_short_error("own_model_of_this_test", "Python code", str(base), "--trust-remote-code", code=1)
    assert listing(tmp_path) == before
    done = deltamem("patch", base, "--out", tmp_path / "adapter", "--trust-remote-code")
    assert done.code == 0 and ran.exists()
    ran.unlink()
    with pytest.raises(ArchitectureError, match="trust_remote_code=True"):
        load(tmp_path / "adapter")
    assert not ran.exists()
    model = load(tmp_path / "adapter", trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    randomise(adapter_of(model))
    save_adapter(model, tmp_path / "again")  # its code has been trusted already
    assert read_adapter(tmp_path / "again").base == read_adapter(tmp_path / "adapter").base


def test_code_beside_a_known_architecture_is_not_needed(with_code, tmp_path):
    base, ran = with_code
    said = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**said, "model_type": "qwen3"}))
    assert_patched_is_attached(tiny_model(), base, tmp_path / "adapter")
    assert not ran.exists()


# The Hub

_FETCH = """
import sys
import torch
from tiny import listing, randomise, save_checkpoint, tiny_config, tiny_model, tokens
from deltamem_tool import DeltaMemConfig, load
from deltamem_tool.adapter import create_adapter, read_adapter
from deltamem_tool.errors import ArchitectureError

for revision, seed in (("main", 0), ("v2", 1)):
    out = f"{sys.argv[1]}/{revision}"
    create_adapter("someone/tiny", DeltaMemConfig(rank=4), out, revision=revision)
    base = read_adapter(out).base
    assert (base.name, base.revision) == ("someone/tiny", str(seed + 1) * 40), base
    with torch.no_grad():
        assert torch.equal(load(out)(tokens(1, 5)).logits, tiny_model(seed=seed)(tokens(1, 5)).logits)
for name, revision in (("someone/tiny", "v3"), ("someone/nothing", None), ("someone/diffusion", None)):
    try:
        create_adapter(name, DeltaMemConfig(rank=4), f"{sys.argv[1]}/none", revision=revision)
        raise AssertionError(f"{name} {revision}")
    except ArchitectureError as error:
        assert name in error.what and error.next, error
"""


class _Hub(BaseHTTPRequestHandler):
    """As much of the Hub as its client needs to fetch a snapshot."""

    repositories: dict[str, dict[str, tuple[str, Path]]]  # (commit, folder) by revision by name
    asked: list[str]

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
        revisions = self.repositories.get(name, {})
        wanted = rest[1] if len(rest) > 1 else "main"
        found = [place for revision, place in revisions.items() if wanted in (revision, place[0])]
        headers = {"Content-Type": "application/json"}
        content = b"{}"
        if not found:
            code = "RevisionNotFound" if revisions else "RepoNotFound"
            return self.send(404, {"X-Error-Code": code}, content, body)
        commit, folder = found[0]
        headers["X-Repo-Commit"] = commit
        if is_api:
            files = [{"rfilename": file} for file in listing(folder)]
            said = {"id": name, "sha": commit, "siblings": files}
            tree = [{"type": "file", "path": file, "size": size, "oid": file} for file, size in listing(folder).items()]
            content = json.dumps(tree if rest[0] == "tree" else said).encode()
        else:
            file = folder / "/".join(rest[2:])
            if body:
                self.asked.append(f"{name}/{file.name}")
            if not file.is_file():
                return self.send(404, {"X-Error-Code": "EntryNotFound"}, b"", body)
            content = file.read_bytes()
            headers["ETag"] = f'"{commit[:8]}-{file.name}"'
        return self.send(200, headers, content, body)

    def send(self, code: int, headers: dict[str, str], content: bytes, body: bool) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def test_a_hub_id_and_its_revisions(tmp_path):
    """Over HTTP, with the Hub's own client."""
    first = save_checkpoint(tmp_path / "first")
    save_file({"again": torch.zeros(1)}, first / "consolidated.safetensors")  # the same weights in another format
    (first / "pytorch_model.bin").write_bytes(b"no one asks for it")
    second = in_pieces(tiny_model(seed=1), tmp_path / "second")
    (tmp_path / "diffusion").mkdir()
    (tmp_path / "diffusion" / "model_index.json").write_text("{}")
    save_file({"unet": torch.zeros(1)}, tmp_path / "diffusion" / "model.safetensors")
    repositories = {
        "someone/tiny": {"main": ("1" * 40, first), "v2": ("2" * 40, second)},
        "someone/diffusion": {"main": ("3" * 40, tmp_path / "diffusion")},
    }
    asked: list[str] = []
    handler = type("Hub", (_Hub,), {"repositories": repositories, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(Path(__file__).parent),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    (tmp_path / "out").mkdir()
    try:
        command = [sys.executable, "-c", _FETCH, str(tmp_path / "out")]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env=environment, cwd=tmp_path
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"main", "v2"}
    assert asked.count("someone/tiny/model.safetensors") == 1
    for file in ("tiny/consolidated.safetensors", "tiny/pytorch_model.bin", "diffusion/model.safetensors"):
        assert f"someone/{file}" not in asked


# Quantised


def gptq_like(base: Path) -> Path:
    """What GPTQ leaves of a linear layer: packed integers and their scales, and no weight."""
    weights = load_file(base / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        out, wide = weights.pop(name).shape
        own = name.removesuffix("weight")
        generator = torch.Generator().manual_seed(len(weights))
        packed = torch.randint(2**31 - 1, (wide // 8, out), generator=generator, dtype=torch.int32)
        weights |= {f"{own}qweight": packed, f"{own}scales": torch.rand(1, out, generator=generator).half()}
        weights[f"{own}g_idx"] = torch.zeros(wide, dtype=torch.int32)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    said = json.loads((base / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (base / "config.json").write_text(json.dumps(said))
    return base


def test_a_quantised_checkpoint_is_patched_without_its_library(tmp_path):
    base = gptq_like(save_checkpoint(tmp_path / "base"))
    other = gptq_like(save_checkpoint(tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.qweight"][0, 1] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    marks = []
    for folder in (base, other, base):
        adapter = create_adapter(str(folder), DeltaMemConfig(rank=4), tmp_path / "adapter", overwrite=True)
        marks.append(adapter.base.fingerprint)
    assert marks[0] == marks[2] != marks[1]
    with pytest.raises(ConfigError, match="quantised"):
        create_adapter(str(base), CONFIG, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_bitsandbytes(tmp_path):
    """A plain checkpoint that is quantised when it is loaded; the adapter is the plain one's."""
    base = save_checkpoint(tmp_path / "base")
    plain = load(patched(base, tmp_path / "adapter"))
    int8 = BitsAndBytesConfig(load_in_8bit=True)
    loaded = load(tmp_path / "adapter", quantization_config=int8)
    assert type(loaded.model.layers[0].self_attn.q_proj).__name__ == "Linear8bitLt"
    close = dict(atol=0.05 * logits(plain).abs().max().item(), rtol=0)
    torch.testing.assert_close(logits(loaded), logits(plain), **close)
    # attached in memory, it is the same
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=int8).eval()
    bare = logits(model)
    attach(model, DeltaMemConfig(rank=4))
    assert torch.equal(logits(model), bare)
    adapter_of(model).load_state_dict(adapter_of(plain).state_dict())
    assert torch.equal(logits(model), logits(loaded)) and not torch.equal(logits(model), bare)
    save_adapter(model, tmp_path / "again")
    assert read_adapter(tmp_path / "again").base.fingerprint == read_adapter(tmp_path / "adapter").base.fingerprint
    detach(model)
    assert torch.equal(logits(model), bare)
    with pytest.raises(ConfigError, match="quantised"):
        attach(model, CONFIG)


def test_a_checkpoint_that_bitsandbytes_has_quantised(tmp_path):
    plain = save_checkpoint(tmp_path / "plain")
    int8 = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=int8).eval()
    model.save_pretrained(tmp_path / "base")
    patched(tmp_path / "base", tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    attach(model, DeltaMemConfig(rank=4))
    adapter_of(model).load_state_dict(adapter_of(loaded).state_dict())
    assert torch.equal(logits(loaded), logits(model))


def patched(base: Path, out: Path) -> Path:
    """An adapter that matters, in its folder."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    randomise(attach(model, DeltaMemConfig(rank=4)))
    save_adapter(model, out)
    return out


# PEFT


@torch.no_grad()
def stir(model, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("wrapped", [False, True], ids=["injected", "PeftModel"])
def test_a_lora_that_is_there_already(wrapped, tmp_path):
    base = save_checkpoint(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    if wrapped:
        model = peft.get_peft_model(model, config).eval()
    else:
        model.add_adapter(config)
    bare = logits(AutoModelForCausalLM.from_pretrained(base).eval())
    stir(model)
    tuned = logits(model)
    assert not torch.allclose(tuned, bare)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(trained.values()) and not all(trained.values())

    adapter = attach(model, DeltaMemConfig(rank=4))
    assert torch.equal(logits(model), tuned), "the LoRA stays on"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    randomise(adapter)
    changed = logits(model)
    assert not torch.allclose(changed, tuned)
    cache = MemoryCache(model)
    with torch.no_grad():
        model(tokens(2, 4), past_key_values=cache)
        later = model(tokens(2, 9)[:, 4:], past_key_values=cache)
    assert later.past_key_values.memory is not None
    asked = {"input_ids": tokens(1, 4), "max_new_tokens": 3, "do_sample": False}
    said = model.generate(**asked)
    assert said.shape == (1, 7)
    if wrapped:
        assert torch.equal(model.get_base_model().generate(**asked), said)

    save_adapter(model, tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").base.name == str(base)
    # The LoRA is not in the adapter's folder: loaded, it goes onto the model again.
    again = load(tmp_path / "adapter")
    again.add_adapter(config)
    stir(again)
    torch.testing.assert_close(logits(again), changed)

    detach(model)
    assert torch.equal(logits(model), tuned)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained


def test_a_lora_that_comes_later_is_left_alone(tmp_path):
    model = tiny_model()
    bare = logits(model)
    attach(model, DeltaMemConfig(rank=4))
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    stir(model)
    assert not torch.equal(logits(model), bare)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    detach(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_learned_prompt_is_refused():
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(ArchitectureError, match="PREFIX_TUNING"):
        attach(peft.get_peft_model(tiny_model(), config))


def test_a_peft_adapter_is_no_checkpoint(tmp_path):
    peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "lora"
    )
    with pytest.raises(ArchitectureError, match="is a PEFT adapter"):
        create_adapter(str(tmp_path / "lora"), CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()
