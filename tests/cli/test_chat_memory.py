"""The memory file of a chat: what is written to it and when, and what is never overwritten."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor

import pytest
from cli.chatting import ANSWER, ASKED, TOLD, same
from helpers.full_disk import small_files
from helpers.tiny import listing

from deltamem_tool.chat.engine import empty_memory
from deltamem_tool.memory.file import StoredMemory, read_memory, write_memory
from deltamem_tool.memory.shared_file import MemoryConflict, SharedMemoryFile


def test_undo_restores_memory_and_context(talk, working_folder):
    chat = talk(memory_file=working_folder / "me")
    chat(TOLD)
    memory, context = chat.conversation.memory, chat.conversation.context
    assert chat(ASKED)[0] == f"{ANSWER}\n" and not same(chat.conversation.memory, memory)
    assert same(read_memory("me"), chat.conversation.memory)
    assert "undone" in chat("/undo")[1]
    assert same(chat.conversation.memory, memory) and chat.conversation.context == context
    assert same(read_memory("me"), memory)
    assert chat(ASKED)[0] == f"{ANSWER}\n"
    assert [chat("/undo")[1].count("undone") for _ in range(3)] == [1, 1, 0]
    assert chat.chat.failures == 1 and not any(state.any() for state in read_memory("me").states.values())


def test_forget_clears_memory_and_context(talk, working_folder):
    chat = talk(memory_file=working_folder / "me", system="Be kind.")
    for line in (TOLD, "/forget"):
        chat(line)
    assert not any(state.any() for state in read_memory("me").states.values())
    assert chat.conversation.context.tokens == chat.conversation.context.messages == 0
    assert ANSWER not in chat(ASKED)[0]
    assert chat.conversation.messages[0] == {"role": "system", "content": "Be kind."}  # which every context starts with
    assert [message["role"] for message in chat.conversation.messages] == ["system", "user", "assistant"]


def test_a_memory_is_saved_and_loaded(talk, working_folder, engine):
    chat = talk(memory_file=working_folder / "me")
    chat(TOLD)
    memory = chat.conversation.memory
    assert "Saved to other" in chat("/save other")[1] and same(read_memory("other"), memory)
    chat("/forget")
    chat("/load  other ")
    assert same(chat.conversation.memory, memory)
    assert chat(ASKED)[0] == f"{ANSWER}\n"

    now, before = chat.conversation.memory, listing(working_folder)
    write_memory("stranger", StoredMemory(empty_memory(engine).states, {}, "0" * 64))
    for line, says in (
        ("/load stranger", "another adapter"),
        ("/load nowhere", "memory file nowhere does not exist"),
        ("/load", "/load needs a file"),
        ("/save", "/save needs a file"),
        ("/save other/me", "Choose another place"),
        (f"/save {'x' * 300}", "too long"),
        ("/save ~nobody-here/me", "is not a valid path"),
    ):
        assert says in chat(line)[1], line
    assert chat.chat.failures == 7 and same(chat.conversation.memory, now)
    assert listing(working_folder) == {**before, "stranger": listing(working_folder)["stranger"]}


def test_files_that_are_not_memories_are_not_overwritten(talk, working_folder):
    (working_folder / "notes.txt").write_text("mine")
    (working_folder / "folder").mkdir()
    chat = talk()
    for name in ("notes.txt", "folder"):
        assert f"{name} exists and is not a memory file." in chat(f"/save {name}")[1]
    assert (working_folder / "notes.txt").read_text() == "mine"
    chat("/save me")
    chat(TOLD)
    chat("/save me")  # an existing memory file may be overwritten
    assert same(read_memory("me"), chat.conversation.memory)


def test_the_chat_continues_when_the_disk_is_full(talk, working_folder):
    chat = talk(memory_file=working_folder / "me")
    chat(TOLD)
    memory, before = read_memory("me"), listing(working_folder)
    with small_files(2000):
        answered, notice = chat(ASKED)
    assert answered == f"{ANSWER}\n" and chat.chat.failures == 1
    assert "me could not be written and is unchanged." in notice and "disk is full" in notice
    assert same(read_memory("me"), memory) and listing(working_folder) == before
    chat("Thank you.")
    assert same(read_memory("me"), chat.conversation.memory)


def test_the_chat_continues_when_the_folder_is_deleted(talk, working_folder):
    (working_folder / "folder").mkdir()
    chat = talk(memory_file=working_folder / "folder" / "me")
    chat(TOLD)
    (working_folder / "folder").rename(working_folder / "moved")
    (working_folder / "folder").write_text("in the way")
    answered, notice = chat(ASKED)
    assert answered == f"{ANSWER}\n" and "could not be written" in notice and chat.chat.failures == 1
    (working_folder / "folder").unlink()
    chat("Thank you.")
    assert same(read_memory("folder/me"), chat.conversation.memory)


def test_ctrl_c_does_not_stop_a_save(talk, working_folder, monkeypatch):
    chat = talk(memory_file=working_folder / "me")
    real = SharedMemoryFile.write
    pressed = []

    def interrupted(file, memory):
        real(file, memory)
        if not pressed:
            pressed.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(SharedMemoryFile, "write", interrupted)
    chat(TOLD)
    assert pressed and same(read_memory("me"), chat.conversation.memory)
    assert chat.chat.interrupted  # ends a chat without a terminal


# Another memory than the file's


def test_a_loaded_memory_is_saved_to_a_new_file(talk, working_folder):
    """`/load bob` under `--memory alice`: alice's file stays as it is."""
    talk(memory_file=working_folder / "bob.safetensors")("By the way, my dog is Rex.")
    chat = talk(memory_file=working_folder / "alice.safetensors")
    chat(TOLD)
    alice, bob, before = read_memory("alice.safetensors"), read_memory("bob.safetensors"), listing(working_folder)
    notice = chat("/load bob.safetensors")[1]
    assert "saved to" in notice and "alice-2.safetensors" in notice
    assert same(chat.conversation.memory, bob) and listing(working_folder) == before
    chat(ASKED)
    assert same(read_memory("alice.safetensors"), alice) and same(read_memory("bob.safetensors"), bob)
    assert same(read_memory("alice-2.safetensors"), chat.conversation.memory)
    chat("/load bob.safetensors")
    chat(ASKED)
    assert set(listing(working_folder)) == {
        "alice.safetensors",
        "alice-2.safetensors",
        "alice-3.safetensors",
        "bob.safetensors",
    }
    chat("/load alice.safetensors")  # whose file is then written again
    assert same(chat.conversation.memory, alice)
    chat(ASKED)
    assert same(read_memory("alice.safetensors"), chat.conversation.memory) and len(listing(working_folder)) == 4


def test_undo_reverts_a_load_separately_from_turns(talk, working_folder):
    talk(memory_file=working_folder / "bob")("By the way, my dog is Rex.")
    chat = talk(memory_file=working_folder / "alice")
    empty = chat.conversation.memory
    chat(TOLD)
    memory, context = chat.conversation.memory, chat.conversation.context
    chat("/load bob")
    assert "/load is undone" in chat("/undo")[1]
    assert same(chat.conversation.memory, memory) and same(read_memory("alice"), memory)
    assert chat.conversation.context == context
    chat("/load bob")
    chat(ASKED)
    assert "turn is undone" in chat("/undo")[1] and same(chat.conversation.memory, read_memory("bob"))
    assert "/load is undone" in chat("/undo")[1] and same(chat.conversation.memory, memory)
    assert same(read_memory("alice"), memory)
    chat(ASKED)
    assert same(read_memory("alice"), chat.conversation.memory), "alice's file is written again"
    assert [chat("/undo")[1].count("turn is undone") for _ in range(3)] == [1, 1, 0]
    assert same(read_memory("alice"), empty) and chat.conversation.context.tokens == 0


def test_a_load_without_turns_can_be_undone(talk, working_folder):
    talk(memory_file=working_folder / "bob")(TOLD)
    chat = talk()
    chat("/load bob")
    assert "/load is undone" in chat("/undo")[1] and "nothing to undo" in chat("/undo")[1]
    assert not any(state.any() for state in chat.conversation.memory.states.values())


def test_a_loaded_memory_can_be_saved_to_the_file_by_name(talk, working_folder):
    talk(memory_file=working_folder / "bob")(TOLD)
    chat = talk(memory_file=working_folder / "alice")
    chat("Hello.")
    for line in ("/load bob", "/save alice"):
        chat(line)
    assert same(read_memory("alice"), read_memory("bob"))
    chat(ASKED)
    assert same(read_memory("alice"), chat.conversation.memory) and set(listing(working_folder)) == {"alice", "bob"}


# Two writers


def test_the_second_writer_is_warned_and_saves_to_another_file(talk, working_folder):
    one, two = talk(memory_file=working_folder / "me.safetensors"), talk(memory_file=working_folder / "me.safetensors")
    one(TOLD)
    answered, notice = two("By the way, my cat is Tom.")
    assert answered and "me.safetensors was changed by another program." in notice and "me-2.safetensors" in notice
    assert two.chat.failures == 1
    assert same(read_memory("me.safetensors"), one.conversation.memory)
    assert same(read_memory("me-2.safetensors"), two.conversation.memory)
    for chat in (one, two):  # each continues in its own file
        assert "changed" not in chat(ASKED)[1]
    assert same(read_memory("me.safetensors"), one.conversation.memory)
    assert same(read_memory("me-2.safetensors"), two.conversation.memory)
    assert set(listing(working_folder)) == {"me.safetensors", "me-2.safetensors"}


@pytest.mark.parametrize("line", ["/forget", "/undo", "/save me"])
def test_no_command_overwrites_the_file_of_another_program(talk, working_folder, line):
    chat, other = talk(memory_file=working_folder / "me"), talk(memory_file=working_folder / "me")
    chat("Hello.")
    (working_folder / "me").unlink()
    other(TOLD)
    notice = chat(line)[1]
    assert "me was changed by another program." in notice
    assert same(read_memory("me"), other.conversation.memory)
    assert same(read_memory("me-2"), chat.conversation.memory)


def test_a_loaded_file_is_saved_unless_another_program_changed_it(talk, working_folder):
    bob, chat = talk(memory_file=working_folder / "bob"), talk()
    bob(TOLD)
    for line in ("/load bob", ASKED):
        chat(line)
    assert "Saved" in chat("/save bob")[1] and same(read_memory("bob"), chat.conversation.memory)
    write_memory("bob", bob.conversation.memory)  # like bob's next turn
    assert "bob was changed by another program" in chat("/save bob")[1]
    assert same(read_memory("bob"), bob.conversation.memory) and same(read_memory("bob-2"), chat.conversation.memory)


def test_a_deleted_or_unchanged_file_is_not_a_conflict(talk, working_folder):
    chat = talk(memory_file=working_folder / "me")
    chat(TOLD)
    (working_folder / "me").unlink()
    chat(ASKED)
    assert same(read_memory("me"), chat.conversation.memory)
    write_memory("me", chat.conversation.memory)  # perhaps other bytes, but the same memory
    chat("Thank you.")
    assert same(read_memory("me"), chat.conversation.memory) and set(listing(working_folder)) == {"me"}


def test_a_file_that_is_no_longer_a_memory_is_left_unchanged(talk, working_folder):
    chat = talk(memory_file=working_folder / "me")
    chat(TOLD)
    (working_folder / "me").write_text("notes")
    assert "changed by another program" in chat(ASKED)[1]
    assert (working_folder / "me").read_text() == "notes" and same(read_memory("me-2"), chat.conversation.memory)


def test_concurrent_writers_lose_nothing(working_folder, engine):
    """Of many writers that read the same file, one replaces it, and each of the others gets its own file."""
    files = [SharedMemoryFile(working_folder / "me") for _ in range(12)]
    empty = empty_memory(engine).states
    memories = [StoredMemory({i: s + number for i, s in empty.items()}, {}, engine.adapter) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        writes = [pool.submit(file.write, memory) for file, memory in zip(files, memories, strict=True)]
    conflicts = [conflict for conflict in (write.exception() for write in writes) if conflict is not None]
    assert len(conflicts) == 11
    assert all(
        isinstance(error, MemoryConflict) and f"{working_folder / 'me'} was changed" in str(error)
        for error in conflicts
    )
    digests = {read_memory(path).digest() for path in working_folder.iterdir()}
    assert digests == {memory.digest() for memory in memories} and len(listing(working_folder)) == 12


# An answer that nobody reads


def test_an_answer_that_cannot_be_shown_is_remembered(talk, working_folder, monkeypatch):
    shown = talk(memory_file=working_folder / "shown")
    shown(TOLD)
    chat = talk(memory_file=working_folder / "me")
    monkeypatch.setattr(chat.chat, "_write", _closed)
    with pytest.raises(BrokenPipeError):
        chat(TOLD)
    assert same(read_memory("me"), read_memory("shown"))


def test_a_conflict_is_reported_even_if_the_answer_cannot_be_shown(talk, working_folder, monkeypatch):
    one, two = talk(memory_file=working_folder / "me"), talk(memory_file=working_folder / "me")
    one(TOLD)
    monkeypatch.setattr(two.chat, "_write", _closed)
    with pytest.raises(BrokenPipeError):
        two("By the way, my cat is Tom.")
    assert "me was changed by another program" in two.notices
    assert same(read_memory("me-2"), two.conversation.memory)


def _closed(_):
    raise BrokenPipeError(errno.EPIPE, "Broken pipe")
