"""On a GPU: the same tokens as on the CPU, no waiting for the device inside the decoding loop, compiled decoding."""

import pytest
import torch

from generators.next_token import NextToken
from layers.noise import Noise
from layers.spec import Condition, Grid, TokenSpec
from sampling.decode import generate
from sampling.filters import Filter
from sampling.guidance import Guidance
from sampling.sampler import Sampler

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SAMPLER = Sampler(Filter(top_k=20, top_p=0.95), Guidance(scale=2.0))


def model(dtype: torch.dtype) -> NextToken:
    torch.manual_seed(0)
    spec = TokenSpec(Grid(1, 4, 5), decoded=(1, 16, 20), vocab_size=37)
    made = NextToken(spec, dim=32, depth=2, heads=4, num_classes=6)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.to(dtype).eval()


def test_tokens_are_those_of_the_cpu_in_float64() -> None:
    index, made = torch.arange(16), model(torch.float64)
    condition = Condition(label=index % 6)
    on_cpu = generate(made, condition, SAMPLER, Noise(0, index)).tokens
    on_gpu = generate(made.cuda(), condition.to("cuda"), SAMPLER, Noise(0, index.cuda())).tokens
    assert torch.equal(on_cpu, on_gpu.cpu())


def test_the_loop_does_not_wait_for_the_device() -> None:
    index, made = torch.arange(4, device="cuda"), model(torch.float32).cuda()
    condition, noise = Condition(label=index), Noise(0, index)
    generate(made, condition, SAMPLER, noise)  # warms up, and puts the schedule on the device
    with torch.inference_mode():
        state = made.begin([condition, condition.null()], noise)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(state.rounds):
                prediction = made.step(state)
                draw = SAMPLER.draw(prediction, noise, state.round)
                made.commit(state, prediction.positions, prediction.head.sample(prediction.z, draw))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert state.known.all()


def test_compiled_decoding_gives_the_same_tokens() -> None:
    index, made = torch.arange(4, device="cuda"), model(torch.float64).cuda()
    condition, noise = Condition(label=index), Noise(0, index)
    eager = generate(made, condition, SAMPLER, noise).tokens
    made.trunk.compile(dynamic=False)
    assert torch.equal(generate(made, condition, SAMPLER, noise).tokens, eager)
