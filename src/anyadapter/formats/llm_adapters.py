"""The layout of LLM-Adapters' own PEFT fork."""

from __future__ import annotations

from anyadapter.formats.peft import Peft


class LLMAdapters(Peft):
    name = "llm-adapters"
