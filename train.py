"""Train what a configuration describes: python train.py --cfg-path projects/blip2/pretrain_stage1.yaml"""

from lavis_lite.commands.run import train_main

if __name__ == "__main__":
    train_main()
