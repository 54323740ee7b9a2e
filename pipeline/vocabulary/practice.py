"""Training text in which spellings are practised that another text will need.

A vocabulary of the most frequent tokens of the training text may hold all of its words, and spells none of them in
pieces; another text has words that it does not hold. How many, the training text tells: tokens that occur in it once
make up the same part of it as tokens that it lacks make up of another text like it (Good, Biometrika 40, 1953; 1.65 and
1.47 % of Wikipedia summaries in Gemma 3's tokens). In training these are therefore spelled as if they had gone.
"""

import json
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from exporters.merges import Derivations
from pipeline.data.token_bytes import content_of
from pipeline.vocabulary.cut import CutVocabulary
from pipeline.vocabulary.cut_tokenizer import cut_tokenizer
from pipeline.vocabulary.kept import always_kept


def tokenize_to_practise(pieces: Sequence[str], vocabulary: CutVocabulary, counts: Tensor) -> Tensor:
    """Ids of ``vocabulary`` of pieces of text one after another, int32 [n], without those of tokens that occur once.

    ``counts``: occurrences of each id of the full vocabulary in the training text, int64 [ids]. Tokens that others are
    merged from stay, and so do those that stay in any case.
    """
    content = content_of(vocabulary.tokenizer)
    tokens = {index: token for token, index in content["model"]["vocab"].items()}
    once = set((counts[vocabulary.kept] == 1).nonzero().flatten().tolist())
    left = set(range(len(vocabulary.kept))) - (once - always_kept(content, len(vocabulary.kept), ()))
    derivations = Derivations.of(content["model"])
    needed = set().union(*(derivations.ancestors(tokens[index]) for index in left if index in tokens))
    left |= {content["model"]["vocab"][token] for token in needed}
    ids = torch.tensor(sorted(left), dtype=torch.int32)
    tokenizer = Tokenizer.from_str(json.dumps(cut_tokenizer(content, left)))
    encoded = tokenizer.encode_batch(list(pieces), add_special_tokens=False)
    return ids[torch.tensor([index for piece in encoded for index in piece.ids], dtype=torch.int64)]
