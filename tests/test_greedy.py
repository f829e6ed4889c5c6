"""Greedy decoding in bfloat16 is that of `transformers`, token for token, for every family.

Of random weights the two likeliest tokens are often as likely as bfloat16 can tell, and which one
comes first proves nothing. So `transformers` first trains each model, in float32, until it knows
random texts by heart with a margin that bfloat16 cannot blur: then each of the 64 tokens must be
its, and each depends on the tokens before the last, as equal ones are followed by different ones.
"""

import numpy as np
import pytest
import test_encoder_decoder_families as two_stacks
import torch
from flax import nnx
from test_families import CASES, paired, torch_twin

from batiste.inference import SamplingConfig, generate

TOKENS, PROMPTS = 64, (6, 4)  # Of unequal lengths.
LONG = {"max_position_embeddings": 96, "n_positions": 96}
# Of the likeliest logit over the next, at every token; 2 is also all that Gemma 2's cap of 2 allows.
MARGIN, STEPS = 1.5, 3000
STARTS = {"t5": 0, "t5 1.0": 0, "bart": 2, "marian": 36}  # What a decoder begins with.
GREEDY = SamplingConfig(temperature=0.0, top_p=None, max_tokens=TOKENS)


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small learn 30 times as fast where no two threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def learned_by_heart(logits_of, parameters, targets_BT: torch.Tensor) -> None:
    """Trains until every target has its margin; an AssertionError says that it has not."""
    optimizer, learned = torch.optim.Adam(parameters, lr=3e-3), None
    for step in range(STEPS):
        logits_BTV = logits_of()
        losses = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
        if step % 20 == 0:
            with torch.no_grad():
                hit_BT = logits_BTV.gather(2, targets_BT[:, :, None])[:, :, 0]
                others_BTV = logits_BTV.scatter(2, targets_BT[:, :, None], -torch.inf)
                learned = (hit_BT - others_BTV.max(dim=2).values).min()
            if learned > MARGIN:
                return
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
    raise AssertionError(f"after {STEPS} steps the least margin is {learned}")


def texts() -> torch.Tensor:
    """Rows of random tokens, among which each comes about twice with different ones behind it."""
    random = np.random.default_rng(0)
    return torch.tensor(random.integers(3, 36, (len(PROMPTS), max(PROMPTS) + TOKENS)), dtype=torch.long)


def written(logits_of, prompts: list[list[int]]) -> list[list[int]]:
    """64 more tokens of each prompt, each after a whole forward pass."""
    rows = [list(prompt) for prompt in prompts]
    with torch.no_grad():
        for index, row in enumerate(rows):
            while len(row) < len(prompts[index]) + TOKENS:
                row.append(int(logits_of(torch.tensor([row]), index)[0, -1].argmax()))
    return [row[len(prompt):] for row, prompt in zip(rows, prompts, strict=True)]


def ours(pair, prompts: list[list[int]], start_ids: tuple[int, ...] = ()) -> list[list[int]]:
    """What our model writes."""
    assert pair.weights.model.dtype == "bfloat16"
    model = nnx.merge(pair.graphdef, pair.params)
    steps = generate(model, prompts, (), GREEDY, start_ids=start_ids)
    return [list(row) for row in zip(*steps, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_decoder_writes_what_transformers_does(name, tmp_path):
    kind, fields = CASES[name]
    torch_model = torch_twin(kind, {key: LONG.get(key, value) for key, value in fields.items()})
    torch_model.set_experts_implementation("eager")  # Its fast one wants other sizes in bfloat16.
    text_BT, start = texts(), min(PROMPTS)
    learned_by_heart(
        lambda: torch_model(text_BT[:, :-1]).logits[:, start - 1:], torch_model.parameters(),
        text_BT[:, start:])
    torch_model = torch_model.to(torch.bfloat16)
    prompts = [row[:size].tolist() for row, size in zip(text_BT, PROMPTS, strict=True)]
    theirs = written(lambda tokens, _: torch_model(tokens).logits, prompts)
    assert theirs == [
        row[size:size + TOKENS].tolist() for row, size in zip(text_BT, PROMPTS, strict=True)]
    assert ours(paired(tmp_path, torch_model), prompts) == theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", two_stacks.CASES)
def test_an_encoder_decoder_writes_what_transformers_does(name, tmp_path):
    kind, fields = two_stacks.CASES[name]
    torch_model = two_stacks.torch_twin(
        kind, {key: LONG.get(key, value) for key, value in fields.items()})
    text_BT, start = texts()[:, :TOKENS], STARTS[name]
    sources = [row[:size] for row, size in zip(texts().flip(1), PROMPTS, strict=True)]
    inputs_BT = torch.cat([torch.full((len(PROMPTS), 1), start), text_BT[:, :-1]], dim=1)

    def logits_of(inputs_BT, row):
        return torch_model(sources[row][None], decoder_input_ids=inputs_BT).logits

    learned_by_heart(
        lambda: torch.cat([logits_of(inputs_BT[row][None], row) for row in range(len(PROMPTS))]),
        [each for each in torch_model.parameters() if each.requires_grad], text_BT)
    torch_model = torch_model.to(torch.bfloat16)
    theirs = written(logits_of, [[start]] * len(PROMPTS))
    assert theirs == text_BT.tolist()
    prompts = [source.tolist() for source in sources]
    assert ours(two_stacks.paired(tmp_path, torch_model), prompts, (start,)) == theirs
