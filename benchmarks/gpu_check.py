"""Measures BAGEL's phases on one device against their floors, in minutes and without a download.

    python benchmarks/gpu_check.py --model 7b --budget 600
    python benchmarks/gpu_check.py --model mini --device cpu --budget 20

docs/reference/gpu-check.md says what the rows mean.
"""

from gpu_checks.main import main

if __name__ == "__main__":
    raise SystemExit(main())
