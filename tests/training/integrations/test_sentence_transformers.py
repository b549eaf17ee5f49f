"""sentence-transformers refuses to save a model with adapters.

It is not among the packages that tests install: a class of its package stands in for its own, since
peftcore goes by the package of the class and by its methods that save.
"""

from __future__ import annotations

import pytest
from torch import nn

import peftcore


def test_saving_is_refused_until_the_adapters_are_merged() -> None:
    class SentenceTransformer(nn.Sequential):
        def save_pretrained(self, path: str) -> str:
            return path

        def save(self, path: str) -> str:
            return self.save_pretrained(path)

    SentenceTransformer.__module__ = "sentence_transformers.model"
    model = SentenceTransformer(nn.Linear(4, 4))
    assert model.save("folder") == "folder"
    for _ in range(2):
        peftcore.apply(model, "lora", r=2, target_modules=["0"])
        for save in (model.save, model.save_pretrained):
            with pytest.raises(peftcore.PeftcoreError, match=r"default,.* Save the adapters with peftcore.save"):
                save("folder")
        peftcore.merge(model)
        assert model.save("folder") == "folder"
