"""Evaluate a checkpoint: python evaluate.py --cfg-path projects/blip2/pretrain_stage1.yaml"""

from lavis_lite.commands.run import evaluate_main

if __name__ == "__main__":
    evaluate_main()
