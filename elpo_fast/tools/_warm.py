"""Preloaded by the fork server: sympy with what its first use imports and caches.

Every call is a first use, of a copy; without this each pays 20 to 150 ms for it again.
"""

from __future__ import annotations

import sympy

_x = sympy.Symbol("x")
sympy.factor(_x**2 - 1)
sympy.solve(_x**2 - 3 * _x + 2, _x)
sympy.integrate(_x * sympy.exp(_x), _x)
sympy.simplify(sympy.sin(_x) ** 2 + sympy.cos(_x) ** 2)
sympy.Matrix([[1, 2], [3, 5]]).inv()
sympy.factorint(91)
