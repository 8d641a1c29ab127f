"""The maths of diffusion: schedules, losses, bounds, samplers and guidance."""
