"""Golden cases: schedules, training times, prompt order."""

import torch

from rlt2i.functional.schedules import sd3_sigmas
from rlt2i.functional.time_sampling import (
    logit_normal,
    normal_quantile,
    shift_towards,
    stratified_steps,
    stratified_times,
)
from rlt2i.functional.time_weights import noise_aware_weights
from rlt2i.functional.transitions import flow_sde
from rlt2i.functional.windows import random_subset
from tests.helpers.golden_cases import Case, golden
from tests.helpers.published_steps import constructed_sigmas, k_repeat_indices, shifted_linspace_sigmas


@golden("schedule/sd3_shift*/N*")
def test_sd3_sigmas(case: Case):
    sigmas = sd3_sigmas(case["num_steps"], shift=case["shift"], num_train_timesteps=case["num_train_timesteps"])
    case.expect("sigmas", sigmas)
    case.expect("timesteps", 1000 * sigmas[:-1])


@golden("schedule/*/train1000")
def test_constructed_sigmas(case: Case):
    sigmas = constructed_sigmas(shift=case["shift"])
    assert len(sigmas) == case.expected("len_sigmas")
    case.expect("sigmas", sigmas[case["indices"]])
    case.expect("timesteps", 1000 * sigmas[case["indices"]])


@golden("schedule/*linspace*")
def test_shifted_linspace_sigmas(case: Case):
    case.expect("sigmas", shifted_linspace_sigmas(case["num_steps"], shift=case["shift"]))


@golden("tempflow/weights/*")
def test_noise_aware_weights(case: Case):
    num_steps = case["num_steps"]
    sigmas = sd3_sigmas(num_steps, shift=case["shift"])
    zeros = torch.zeros(num_steps, 1, 1, 1)
    step = flow_sde(zeros, zeros, sigmas[:-1], sigmas[1:], sigma_max=sigmas[1], noise_level=case["noise_level"])
    std = step.std.flatten()
    case.expect("std_full", std)
    # TempFlow's SD3 script multiplies by 2.25 std instead of normalising; for its nine steps that is nearly the
    # same.
    case.expect("code_weight_sd3", 2.25 * std)
    trained = torch.arange(num_steps) < num_steps - 1
    weights = noise_aware_weights(std, mask=trained)
    case.expect(f"mean1_weight_first{num_steps - 1}", weights[:-1])
    assert weights[-1] == 0


@golden("sampler/k_repeat")
def test_k_repeat_indices(case: Case):
    for rank, epochs in case.outputs.items():
        for epoch in epochs:
            indices = k_repeat_indices(
                case["dataset_len"],
                batch_size=case["batch_size"],
                repeats=case["k"],
                num_ranks=case["num_replicas"],
                seed=case["seed"] + int(epoch.removeprefix("epoch")),
            )
            assert list(indices[int(rank.removeprefix("rank"))]) == case.expected(epoch, within=epochs)


@golden("sde/flow_factory/current_sde_steps")
def test_random_subset(case: Case):
    for seed in case.outputs:
        generator = torch.Generator().manual_seed(int(seed))
        steps = random_subset(count=case["num_sde_steps"], steps=case["num_steps"] - 1, generator=generator)
        assert steps == tuple(sorted(case.expected(seed)))  # Flow-Factory leaves them unsorted


@golden("timesteps/awm_logit_normal*")
def test_logit_normal_times(case: Case):
    normal = torch.randn(case["shape"][0], generator=torch.Generator().manual_seed(case["seed"]))
    times = shift_towards(logit_normal(normal, mean=case["m"], std=case["s"]), case["shift"], "noise")
    case.expect("t", times)


@golden("timesteps/flow_factory*")
def test_flow_factory_times(case: Case):
    num = case["num"]

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(case["seed"])

    def places() -> torch.Tensor:
        """Flow-Factory's stratified places, in the random order that it gives them."""
        draws = generator()
        inside = stratified_times(torch.rand(num, generator=draws))
        return inside[torch.randperm(num, generator=draws)]

    # The file does not record the ranges; these reproduce its draws: sigma >= .01 for "uniform". It counts time from
    # the image, so that a place u is the sigma 1 - u.
    uniform = 1 - places() * (1 - 0.01)
    case.expect("uniform", 1000 * uniform[:, None].expand(-1, case["batch"]))
    shifted = shift_towards(uniform, 3.0, "image")
    case.expect("uniform_shift3", 1000 * shifted[:, None].expand(-1, case["batch"]))
    logit = shift_towards(1 - logit_normal(normal_quantile(places())), 3.0, "image")
    case.expect("logit_normal_shift3", 1000 * logit[:, None].expand(-1, case["batch"]))
    timesteps = 1000 * sd3_sigmas(10)
    for name, first, last in (("discrete", 0, 5), ("discrete_wo_init", 1, 8)):
        steps = stratified_steps(torch.rand(num, generator=generator()), first=first, last=last)
        case.expect(name, timesteps[steps][:, None].expand(-1, case["batch"]))
