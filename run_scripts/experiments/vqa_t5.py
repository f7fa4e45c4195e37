"""The arms of vqa.py with the T5 in the place of the OPT.

python run_scripts/experiments/vqa_t5.py --seeds 0 1 2
"""

from __future__ import annotations

from vqa import experiment, main

if __name__ == "__main__":
    main(experiment("_t5"), __doc__)
