"""Tell whether a symbolic size or a guard of an exported program is arithmetic and nothing else.

torch hands sizes to `sympy.sympify` and guards to the Python compiler; both run any Python.
"""

import ast
import re

_SYMBOL = re.compile(r"[a-z]{1,5}\d+")
_SIZES = {
    *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Abs", "Mod"),
    *(
        "floor",
        "ceiling",
        "Eq",
        "Ne",
        "Lt",
        "Le",
        "Gt",
        "Ge",
        "Equality",
        "Unequality",
        "And",
        "Or",
    ),
    *(
        "Not",
        "Relational",
        "StrictLessThan",
        "LessThan",
        "StrictGreaterThan",
        "GreaterThan",
        "true",
    ),
    *("false", "oo", "int_oo", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv"),
    *(
        "CeilToInt",
        "FloorToInt",
        "CeilDiv",
        "PowByNatural",
        "FloatPow",
        "FloatTrueDiv",
        "IntTrueDiv",
    ),
    *("TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity"),
}
_GUARDS = {"L", "max", "min", "abs", "math", "torch", "inf", "True", "False", "not"}
_PARTS = {
    *("size", "stride", "storage_offset", "item", "trunc", "floor", "ceil", "sqrt", "log2", "inf"),
    *(
        "nan",
        "isnan",
        "sym_float",
        "sym_int",
        "sym_max",
        "sym_min",
        "sym_not",
        "sym_ite",
        "sym_sum",
    ),
}
_ASSUMPTIONS = {"positive", "integer", "nonnegative", "real", "zero", "precision", "evaluate"}
_PLAIN = (
    *(ast.Expression, ast.Load, ast.Compare, ast.cmpop, ast.BoolOp, ast.boolop, ast.UnaryOp),
    *(ast.unaryop, ast.Pow, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),
)
_LONGEST, _LARGEST, _MOST_POWERS, _LARGEST_POWER = 20_000, 2**63, 2, 64


def unsafe_size(text: str) -> str:
    """Say why a symbolic size such as "Mul(Integer(4), Symbol('s0'))" is refused, or nothing."""
    return _unsafe(text, "size", _SIZES)


def unsafe_guard(text: str) -> str:
    """Say why a guard such as "L['x'].size()[0] <= 64" is refused, or nothing."""
    return _unsafe(text, "guard", _GUARDS)


def _unsafe(text: str, what: str, names: set[str]) -> str:
    refused = f"has a {what} that is not arithmetic, {text[:80]!r}; it could run code, refused"
    if len(text) > _LONGEST:
        return f"has a {what} of {len(text)} characters; refused"
    try:
        tree = ast.parse(text, mode="eval")
        nodes = list(ast.walk(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return refused
    powers = sum(_is_power(node) for node in nodes)
    if powers > _MOST_POWERS or not all(_plain(node, names) for node in nodes):
        return refused
    return ""


def _plain(node: ast.AST, names: set[str]) -> bool:
    if isinstance(node, _PLAIN):
        return True
    if isinstance(node, ast.Name):
        return node.id in names or bool(_SYMBOL.fullmatch(node.id))
    if isinstance(node, ast.Constant):
        return _constant(node.value)
    if isinstance(node, ast.keyword):
        return node.arg in _ASSUMPTIONS
    if isinstance(node, ast.Attribute):
        return names is _GUARDS and node.attr in _PARTS
    if isinstance(node, ast.Subscript):
        return names is _GUARDS and isinstance(node.slice, ast.Constant)
    if isinstance(node, ast.Call):
        return isinstance(node.func, (ast.Name, ast.Attribute)) and _power_is_small(node)
    return isinstance(node, ast.BinOp) and _power_is_small(node)


def _constant(value: object) -> bool:
    if isinstance(value, str):  # a symbol's name, an input's name, or the digits of a float
        return re.fullmatch(r"\w{1,64}|-?\d{1,40}(\.\d{1,40})?(e[+-]?\d{1,3})?", value) is not None
    return isinstance(value, (bool, float)) or (isinstance(value, int) and value < _LARGEST)


def _is_power(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Pow)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and "Pow" in node.func.id


def _power_is_small(node: ast.Call | ast.BinOp) -> bool:
    if not _is_power(node):
        return True
    if isinstance(node, ast.BinOp):
        return _small(node.right)
    return len(node.args) == 2 and _small(node.args[1])


def _small(exponent: ast.expr) -> bool:
    if isinstance(exponent, ast.Call) and len(exponent.args) == 1:
        exponent = exponent.args[0]
    if isinstance(exponent, ast.UnaryOp):
        exponent = exponent.operand
    return (
        isinstance(exponent, ast.Constant)
        and isinstance(exponent.value, int)
        and abs(exponent.value) <= _LARGEST_POWER
    )
