"""The range of everything seen."""
from .base import Observer, _observers


@_observers.register('minmax')
class MinMaxObserver(Observer):
    """Running minimum and maximum: nothing is clipped.   a = max|x| (signed), max(max x, 0) (unsigned)"""

    def _amax(self, grid):
        return self._top(grid)
