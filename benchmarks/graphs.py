"""Pictures of ResNet-18 before and after `gq.attach`, for the README, as PNG and SVG.

    python benchmarks/graphs.py --output-dir results

Weights, data and therefore ranges are random, the same in every run.
"""
import argparse
from pathlib import Path

import mxnet as mx
from gluoncv.model_zoo import get_model
from mxnet import init, nd

import gluonquant as gq

KINDS = ('png', 'svg')


def make_nets(size=64, batches=4):
    """The float net, with BatchNorm statistics of random images, and the net that shares its Parameters at 4 bits."""
    mx.random.seed(0)
    net = get_model('resnet18_v1b')
    net.initialize(init.Xavier(rnd_type='gaussian', factor_type='in', magnitude=2))
    images = [nd.random.normal(shape=(8, 3, size, size)) for _ in range(batches)]
    gq.reestimate_batchnorm(net, images)
    quantized = gq.attach(net, bits=4)
    gq.calibrate(quantized, images)
    return net, quantized


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output-dir', type=Path, default=Path('results'), help='where the pictures go')
    args = parser.parse_args()
    net, quantized = make_nets()
    for kind in KINDS:
        gq.draw(net, args.output_dir / f'graph_resnet18_float.{kind}', title='ResNet-18, float')
        gq.draw(quantized, args.output_dir / f'graph_resnet18_w4a4.{kind}', title='gq.attach(net, bits=4)')


if __name__ == '__main__':
    main()
