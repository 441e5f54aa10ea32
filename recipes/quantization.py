"""What the recipes for classifiers and detectors quantize with: the options, and the step itself."""
import gluonquant as gq


def add_options(parser, bits):
    """Add the options of quantization, by default to `bits` bits, to an ArgumentParser."""
    add = parser.add_argument_group('quantization').add_argument
    add('--bits', type=int, default=bits, help='bits of weights and activations')
    add('--method', help='quantization method of weights and activations')
    add('--weight', help='method of weights')
    add('--activation', help='method of activations')
    add('--weight-bits', type=int, help='bits of weights, if not --bits')
    add('--activation-bits', type=int, help='bits of activations, if not --bits')
    add('--first-last-bits', type=lambda text: None if text == 'float' else int(text), default=8, metavar='BITS',
        help="bits of the first layer and of the last ones, or 'float'")
    add('--per-tensor', action='store_true', help='one scale for each weight, where its method has one per channel')
    add('--graph', action='store_true', help='quantize the traced graph: inputs of sums, poolings and concats too')
    add('--target', choices=sorted(gq.graph.TARGETS), help='with --graph, where this engine wants quantizers')
    add('--fold', choices=['frozen', 'batch'], help='fold BatchNorm into the weights that are quantized, with running '
        'statistics or with those of the batch')
    add('--observer', choices=gq.observers.available(), help='what sets the initial ranges; default: the method says')
    add('--calibration-batches', type=int, default=10, help='training batches that set the initial ranges')
    return add


def widths(args):
    """'W3A4': bits of weights and of activations."""
    weight, activation = (args.bits if own is None else own for own in (args.weight_bits, args.activation_bits))
    return f'W{weight}A{activation}'


def quantize(net, batches, args):
    """Return `net` quantized and calibrated: changed in place, or as a graph that shares its parameters."""
    net.hybridize(False)            # a traced graph cannot be converted
    options = {'method': args.method, 'weight': args.weight, 'activation': args.activation,
               'weight_bits': args.weight_bits, 'activation_bits': args.activation_bits,
               'first_last_bits': args.first_last_bits, 'per_channel': False if args.per_tensor else None}
    try:
        if args.graph:
            net = gq.attach(net, args.bits, target=args.target, **options)
        else:
            gq.convert(net, args.bits, **options)
        if args.fold:
            gq.fold(net, args.fold)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    gq.calibrate(net, batches, batches=args.calibration_batches, observer=args.observer)
    return net
