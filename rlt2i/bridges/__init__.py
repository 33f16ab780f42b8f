"""Credit and objectives of this package inside engines that already run on many machines.

Each module plugs into one engine's own extension points and nothing else of it: `unirl` into UniRL's algorithms,
`miles` into miles_diffusion's `--custom-*-path` flags, `verl_omni` into verl-omni's registries. The engine keeps
rollouts, rewards, sharding and the optimiser; credit (maps included) and, where the engine lets go of the loss, the
objective come from here. See docs/bridges.md.
"""
