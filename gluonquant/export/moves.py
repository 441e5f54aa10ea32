"""Writers of operators that move or select elements."""

import numpy as np

from ..symbol_graph import integers
from .table import indices, moved, real, writes
from .values import Moved


@writes('Dropout', '_copy', 'BlockGrad', 'Cast', 'amp_cast')
def passed(to, node):
    return to.value(node.inputs[0])


@writes('amp_multicast')
def passed_together(to, node):
    return [to.value(entry) for entry in node.inputs]


@writes('Concat')
def concat(to, node):
    axis = int(node.attrs.get('dim', 1))
    return Moved(to.net.label(node), tuple(to.value(entry) for entry in node.inputs),
                 lambda name, sources, grid: to.write('Concat', sources, name, axis=axis))


@writes('Flatten')
def flatten(to, node):
    return moved(to, node, 'Flatten', axis=1)


@writes('Reshape', 'reshape_like')
def reshape(to, node):
    shape = to.shapes[node, 0]
    first = to.shape(node.inputs[0])[:1]
    if sum(size == 0 for size in shape) > 1:
        raise to.refused(node, 'the batch is part of several axes of its output')
    sizes = [size or -1 for size in shape]
    if shape[:1] == first == (0,):
        sizes[0] = 0        # stays as it is
    return moved(to, node, 'Reshape', indices(to, node, 'shape', sizes))


@writes('transpose')
def transpose(to, node):
    ndim = len(to.shape(node.inputs[0]))
    return moved(to, node, 'Transpose', perm=list(integers(node.attrs.get('axes', ''))) or list(range(ndim))[::-1])


@writes('SwapAxis')
def swap(to, node):
    order = list(range(len(to.shape(node.inputs[0]))))
    first, second = int(node.attrs.get('dim1', 0)), int(node.attrs.get('dim2', 0))
    order[first], order[second] = order[second], order[first]
    return moved(to, node, 'Transpose', perm=order)


@writes('expand_dims')
def expand(to, node):
    axis = int(node.attrs['axis']) % len(to.shapes[node, 0])
    return moved(to, node, 'Unsqueeze', indices(to, node, 'axes', [axis]))


@writes('squeeze')
def squeeze(to, node):
    shape = to.shape(node.inputs[0])
    given = integers(node.attrs.get('axis', ''))
    axes = [axis % len(shape) for axis in given] or [axis for axis, size in enumerate(shape) if size == 1]
    return moved(to, node, 'Squeeze', indices(to, node, 'axes', axes))


@writes('slice_axis')
def slice_axis(to, node):
    axis = int(node.attrs['axis']) % len(to.shape(node.inputs[0]))
    return _sliced(to, node, [(axis, _bound(node.attrs['begin'], 0), _bound(node.attrs['end'], _FAR), 1)])


@writes('slice')
def cut(to, node):
    begin, end = (_bounds(node.attrs[name]) for name in ('begin', 'end'))
    steps = _bounds(node.attrs.get('step', '')) or [None] * len(begin)
    parts = []
    for axis, (start, stop, step) in enumerate(zip(begin, end, steps)):
        if (start, stop, step) != (None, None, None):
            step = step or 1
            parts.append((axis, (0 if step > 0 else _FAR) if start is None else start,
                          (_FAR if step > 0 else -_FAR) if stop is None else stop, step))
    return _sliced(to, node, parts)


@writes('slice_like')
def slice_like(to, node):
    shape, like = (to.shape(entry) for entry in node.inputs)
    axes = integers(node.attrs.get('axes', '')) or range(len(shape))
    return _sliced(to, node, [(axis % len(shape), 0, like[axis], 1) for axis in axes if shape[axis] != like[axis]])


_FAR = 2 ** 31 - 1


def _bound(text, default):
    return default if text == 'None' else int(text)


def _bounds(text):
    parts = text.strip('()[] ').split(',')
    return [None if part.strip() == 'None' else int(part) for part in parts if part.strip()]


def _sliced(to, node, parts):
    if not parts:
        return to.value(node.inputs[0])
    axes, starts, ends, steps = zip(*parts)
    return moved(to, node, 'Slice', *(indices(to, node, what, values) for what, values in (
        ('starts', starts), ('ends', ends), ('axes', axes), ('steps', steps))))


@writes('SliceChannel')
def split(to, node):
    axis, count = int(node.attrs.get('axis', 1)), int(node.attrs['num_outputs'])
    size = to.shape(node.inputs[0])[axis] // count
    made = []
    for number in range(count):
        bounds = [indices(to, node, what, [value]) for what, value in (
            ('starts', number * size), ('ends', (number + 1) * size), ('axes', axis), ('steps', 1))]
        part = moved(to, node, 'Slice', *bounds)
        if node.says('squeeze_axis'):
            axes = indices(to, node, 'axes', [axis])
            part = Moved(part.name, (part,), lambda name, sources, grid, axes=axes: to.write(
                'Squeeze', [*sources, axes], name))
        made.append(part)
    return made


@writes('Pad')
def pad(to, node):
    width, mode = integers(node.attrs['pad_width']), node.attrs['mode']
    value = float(node.attrs.get('constant_value', 0))
    pads = indices(to, node, 'pads', [*width[::2], *width[1::2]])
    if mode != 'constant':
        return moved(to, node, 'Pad', pads, mode=mode)
    if value:
        return real(to, node, 'Pad', [to.real(to.value(node.inputs[0])), pads, to.number(value)], mode=mode)
    return moved(to, node, 'Pad', pads, mode=mode, fill=lambda grid: to.number(
        0 if grid is None else grid.zero_point, 'float32' if grid is None else grid.dtype))


@writes('UpSampling')
def upsampling(to, node):
    if node.attrs['sample_type'] != 'nearest' or len(node.inputs) > 1:
        raise to.refused(node, 'only nearest neighbours of one input are expressible')
    scales = to.constant(f'{to.net.label(node)}.scales', np.array([1, 1] + 2 * [int(node.attrs['scale'])], np.float32))
    return moved(to, node, 'Resize', '', scales, mode='nearest', coordinate_transformation_mode='asymmetric',
                  nearest_mode='floor')


@writes('_contrib_BilinearResize2D')
def bilinear(to, node):
    aligned = node.attrs.get('align_corners', 'True') in ('True', 'true', '1')
    shape = to.shapes[node, 0]
    old = to.shape(node.inputs[0])
    if 0 in old[1:]:
        raise to.refused(node, 'the size of its input is unknown')
    scales = to.constant(f'{to.net.label(node)}.scales',
                         np.array([1, 1, *map(_scale, shape[2:], old[2:])], np.float32))
    return real(to, node, 'Resize', [to.real(to.value(node.inputs[0])), '', scales], mode='linear',
                 coordinate_transformation_mode='align_corners' if aligned else 'half_pixel')


def _scale(new, old):
    """The scale by which an axis grows, in float32, such that the exact product with the old size reaches the new."""
    scale = np.float32(new / old)
    while old * float(scale) < new:
        scale = np.nextafter(scale, np.float32(np.inf))
    return scale


@writes('depth_to_space', 'space_to_depth')
def rearranged(to, node):
    op = 'DepthToSpace' if node.op == 'depth_to_space' else 'SpaceToDepth'
    return moved(to, node, op, blocksize=int(node.attrs['block_size']))


@writes('tile')
def tiled(to, node):
    repeats = list(integers(node.attrs['reps']))
    ndim = len(to.shape(node.inputs[0]))
    if len(repeats) > ndim:
        raise to.refused(node, 'it adds axes')
    return moved(to, node, 'Tile', indices(to, node, 'repeats', [1] * (ndim - len(repeats)) + repeats))


@writes('reverse')
def reverse(to, node):
    axes = integers(node.attrs['axis'])
    return _sliced(to, node, [(axis, _FAR, -_FAR, -1) for axis in axes])
