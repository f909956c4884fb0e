#!/usr/bin/env python
"""
Trains and evaluates detectors and classifiers by backpropagation, sign-symmetry, feedback alignment
and relatives.

    tools/train_net.py --config-file imagenet_resnet18_ss.yaml --num-gpus 8
    tools/train_net.py --config-file retinanet_ss.yaml --num-gpus 8
    tools/train_net.py --config-file retinanet_ss.yaml --num-gpus 8 --resume
    tools/train_net.py --config-file retinanet_ss.yaml --eval-only MODEL.WEIGHTS model_best.pth
    tools/train_net.py --config-file retinanet_ss.yaml --num-gpus 1 MODEL.FEEDBACK.RULE frsf

--config-file takes a path, or the name of a config that ships with ss_detectron. On a machine
without a GPU it trains on the CPU, in as many processes as --num-gpus says.
"""

from ss_detectron.engine import main

if __name__ == "__main__":
    main()
