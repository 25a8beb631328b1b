"""Split a long text into chunks of whole sentences, like `chunk_text_into_sentences` of MemoryAgentBench."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deltamem_tool.errors import ConfigError

BENCHMARK_ENCODING = "o200k_base"  # of gpt-4o-mini, whose tokens the benchmark counts
Count = Callable[[Sequence[str]], list[int]]


def sentence_chunks(text: str, size: int, count: Count) -> list[str]:
    """Split a text into sentences with NLTK's Punkt, and join them with spaces while they have at most `size` tokens.

    A sentence that is longer is a chunk of its own. If the first sentence is such a one, the script of the benchmark
    begins with an empty chunk; this function does not.

    Args:
        text: the whole text.
        size: maximum number of tokens in a chunk.
        count: returns the number of tokens of each sentence.

    Raises:
        ConfigError: NLTK or its sentence model is not installed.
    """
    chunks: list[list[str]] = [[]]
    used = 0
    sentences = _sentences(text)
    for sentence, tokens in zip(sentences, count(sentences), strict=True):
        if used + tokens > size and chunks[-1]:
            chunks.append([])
            used = 0
        chunks[-1].append(sentence)
        used += tokens
    return [" ".join(sentences) for sentences in chunks if sentences]


def _sentences(text: str) -> list[str]:
    try:
        import nltk
    except ImportError as error:
        raise ConfigError(
            "Splitting texts into sentences needs the package nltk.", f"{error}.", "pip install 'deltamem-tool[eval]'."
        ) from error
    try:
        sentences: list[str] = nltk.sent_tokenize(text)
        return sentences
    except LookupError as error:
        raise ConfigError(
            "NLTK's sentence model punkt_tab is not on this machine.",
            "The benchmark splits its texts with this model.",
            "Fetch it once: python -m nltk.downloader punkt_tab.",
        ) from error


def token_counter(tokenizer: str | None = None) -> Count:
    """Return a function that counts tokens as the benchmark does, or with another tokenizer.

    Args:
        tokenizer: folder or Hub id of a model whose tokenizer counts; by default that of gpt-4o-mini.

    Raises:
        ConfigError: tiktoken is not installed, or its vocabulary cannot be fetched.
        HubError, ArchitectureError: there is no such tokenizer.
    """
    if tokenizer is not None:
        return _of_model(tokenizer)
    other = "or count another model's tokens: --set tokenizer=FOLDER_OR_HUB_ID"
    try:
        import tiktoken
    except ImportError as error:
        raise ConfigError(
            "The benchmark's chunks need the package tiktoken.",
            f"{error}.",
            f"pip install 'deltamem-tool[eval]', {other}.",
        ) from error
    try:
        encoding = tiktoken.get_encoding(BENCHMARK_ENCODING)
    except Exception as error:  # what its HTTP client, the disk or a wrong checksum raise
        raise ConfigError(
            f"The vocabulary {BENCHMARK_ENCODING}, which counts a chunk's tokens, cannot be fetched.",
            f"{type(error).__name__}: {str(error)[:300]}.",
            f"Connect once (tiktoken keeps it), {other}.",
        ) from error
    return lambda texts: [len(ids) for ids in encoding.encode_ordinary_batch(list(texts))]


def _of_model(name: str) -> Count:
    from deltamem_tool.base_model.checkpoint import SMALL_FILES
    from deltamem_tool.base_model.tokenizer import read_tokenizer
    from deltamem_tool.io.names import resolve_folder

    tokenizer = read_tokenizer(resolve_folder(name, None, SMALL_FILES, "tokenizer"), for_chat=False)
    # An empty batch is refused by some tokenizers.
    return lambda texts: (
        [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False).input_ids] if texts else []
    )
