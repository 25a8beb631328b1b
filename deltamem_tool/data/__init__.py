"""Conversations become training episodes: what is written, and what is then asked with nothing but the memory.

An episode (arXiv 2605.12357, section 3.4): the write pass sees the history, the read pass a question and its answer,
and only the answer is scored. A source's rows (`sources`) become episodes (`episode`), or dialogues are generated
(`generated`); episodes become tokens (`encode`), which are kept on disk (`encoded`, `cache`) and batched (`collate`).
"""

from deltamem_tool.data.collate import EpisodeCollator, collate
from deltamem_tool.data.encode import IGNORED, EncodedEpisode, EncodedExchange, Encoder
from deltamem_tool.data.encoded import EncodedEpisodes, EpisodeStatistics, TokenCounts, encode_cached
from deltamem_tool.data.episode import ROLES, SUPERVISE, Episode, episodes_of
from deltamem_tool.data.generated import DialogueEpisodes
from deltamem_tool.data.sources import Loaded, read_episodes

__all__ = [
    "IGNORED",
    "ROLES",
    "SUPERVISE",
    "DialogueEpisodes",
    "EncodedEpisode",
    "EncodedEpisodes",
    "EncodedExchange",
    "Encoder",
    "Episode",
    "EpisodeCollator",
    "EpisodeStatistics",
    "Loaded",
    "TokenCounts",
    "collate",
    "encode_cached",
    "episodes_of",
    "read_episodes",
]
