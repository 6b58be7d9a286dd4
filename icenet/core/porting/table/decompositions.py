"""Decompositions of matrices, and what is computed with them. MLX has them on the CPU."""

from __future__ import annotations

from icenet.core.errors import PortError
from icenet.core.porting.table.arrays import tuple_source
from icenet.core.porting.table.base import Operation, entry


def _matrix(n: Operation) -> str:
    return n[_name(n)]


def _name(n: Operation) -> str:
    return "A" if "A" in n.args else "self"


def _with_info(n: Operation, text: str) -> str:
    """Returns a result with the code of an error, 0, of each matrix."""
    matrix = n.tensor(_name(n))
    assert matrix is not None
    shape = matrix.shape[:-2]
    return f"({text}, mx.zeros(({', '.join(map(n.source, shape))}{',' if len(shape) == 1 else ''}), mx.int32))"


entry("linalg_inv", "inverse")(lambda n: n.call("inverse", _matrix(n)))
entry("linalg_inv_ex")(lambda n: _with_info(n, n.call("inverse", _matrix(n))))
entry("linalg_cholesky", "cholesky")(lambda n: n.call("cholesky", n["self"], repr(bool(n.get("upper", False)))))
entry("linalg_cholesky_ex")(lambda n: _with_info(n, n.call("cholesky", n["self"], repr(bool(n.get("upper", False))))))
entry("cholesky_inverse")(lambda n: n.call("cholesky_inverse", n["self"], n["upper"]))
entry("cholesky_solve")(lambda n: n.call("cholesky_solve", n["self"], n["input2"], n["upper"]))
entry("linalg_svdvals")(lambda n: n.call("singular_values", n["A"]))
entry("linalg_det", "det")(lambda n: n.call("determinant", _matrix(n)))
entry("linalg_slogdet", "slogdet")(lambda n: n.call("sign_and_log_determinant", _matrix(n)))
entry("logdet")(lambda n: n.call("log_determinant", n["self"]))
entry("matrix_exp", "linalg_matrix_exp")(lambda n: n.call("matrix_exp", n["self"]))
entry("linalg_eigh", "_linalg_eigh")(lambda n: n.call("eigh", _matrix(n), n["UPLO"]))
entry("linalg_eigvalsh")(lambda n: n.call("eigh", _matrix(n), n["UPLO"]) + "[0]")


@entry("linalg_solve", "linalg_solve_ex")
def solve(n: Operation) -> str:
    if n.get("left", True):
        text = n.call("solve", n["A"], n["B"])
    else:
        text = f"{n.atom('B')} @ {n.call('inverse', n['A'])}"
    return text if n.node.base == "linalg_solve" else _with_info(n, text)


@entry("linalg_solve_triangular")
def solve_triangular(n: Operation) -> str:
    flags = (bool(n.args["upper"]), bool(n.get("left", True)), bool(n.get("unitriangular", False)))
    return n.call("solve_triangular", n["self"], n["B"], *map(repr, flags))


@entry("triangular_solve")
def triangular_solve(n: Operation) -> str:
    upper, turned = bool(n.get("upper", True)), bool(n.get("transpose", False))
    a = f"{n.atom('A')}.swapaxes(-1, -2)" if turned else n["A"]
    text = n.call("solve_triangular", a, n["self"], repr(upper != turned), "True", repr(bool(n.get("unitriangular"))))
    return f"({text}, {n['A']})"


@entry("linalg_qr", "qr")
def qr(n: Operation) -> str:
    matrix = n.tensor(_name(n))
    assert matrix is not None
    rows, columns = matrix.shape[-2:]
    mode = n.get("mode", "reduced" if n.get("some", True) else "complete")
    if mode == "complete" and not (isinstance(rows, int) and isinstance(columns, int) and rows <= columns):
        raise PortError("linalg_qr of more rows than columns has no counterpart in the mode 'complete'")
    text = n.call("qr", _matrix(n))
    return f"(mx.zeros((0,)), {text}[1])" if mode == "r" else text


@entry("linalg_svd", "_linalg_svd")
def svd(n: Operation) -> str:
    return n.call("svd", n["A"], repr(bool(n.get("full_matrices", False))))


@entry("svd")
def svd_with_v(n: Operation) -> str:
    if not n.get("compute_uv", True):
        raise PortError("svd(compute_uv=False) has no counterpart; use torch.linalg.svdvals")
    return n.call("svd_with_v", n["self"], repr(not n.get("some", True)))


@entry("linalg_cond")
def cond(n: Operation) -> str:
    order = n.args.get("p")
    if order is not None:
        return f"{n.call('matrix_norm', n['self'], n['p'])} * " + n.call(
            "matrix_norm", n.call("inverse", n["self"]), n["p"]
        )
    return n.call("condition", n["self"])


@entry("linalg_pinv", "pinverse")
def pinv(n: Operation) -> str:
    matrix = n.tensor("self")
    assert matrix is not None
    rtol, atol = n.args.get("rtol", n.args.get("rcond")), n.args.get("atol")
    if rtol is None:
        size = max(size for size in matrix.shape[-2:] if isinstance(size, int))
        rtol = 0.0 if isinstance(atol, float) and atol > 0 else size * 2.0**-23
    bounds = n.source(rtol), n.source(0.0 if atol is None else atol)
    return n.call("pseudo_inverse", n["self"], *bounds, *(["True"] if n.get("hermitian", False) else []))


@entry("linalg_norm", "linalg_matrix_norm")
def matrix_norm(n: Operation) -> str:
    dims = n.args.get("dim")
    order = n.args.get("ord")
    return n.call("matrix_norm", n["self"], n.source(order), n.source(dims), repr(bool(n.args.get("keepdim"))))


# ---- LU factors, reflections, least squares ------------------------------------------------------------------


entry("linalg_lu")(lambda n: n.call("lu", n["A"]))
entry("linalg_lu_factor")(lambda n: n.call("lu_factor", n["A"]))
entry("lu_unpack")(lambda n: n.call("lu_unpack", n["LU_data"], n["LU_pivots"], n["unpack_data"], n["unpack_pivots"]))
entry("linalg_lu_solve")(
    lambda n: n.call("lu_solve", n["LU"], n["pivots"], n["B"], repr(bool(n.get("left", True))), n["adjoint"])
)
entry("lu_solve")(lambda n: n.call("lu_solve", n["LU_data"], n["LU_pivots"], n["self"]))
entry("linalg_householder_product")(lambda n: n.call("householder_product", n["input"], n["tau"]))
entry("ormqr")(lambda n: n.call("reflect", n["self"], n["input2"], n["input3"], n["left"], n["transpose"]))
entry("linalg_tensorinv")(lambda n: n.call("tensor_inverse", n["self"], n["ind"]))
entry("linalg_tensorsolve")(lambda n: n.call("tensor_solve", n["self"], n["other"], n["dims"]))


@entry("linalg_lu_factor_ex", "_lu_with_info")
def lu_factor_with_info(n: Operation) -> str:
    matrix = n.tensor(_name(n))
    assert matrix is not None
    return f"(*{n.call('lu_factor', _matrix(n))}, mx.zeros({tuple_source(n, matrix.shape[:-2])}, mx.int32))"


@entry("linalg_matrix_rank")
def matrix_rank(n: Operation) -> str:
    x = n.source(n.args.get("input", n.args.get("self")))
    atol, rtol = n.args.get("atol"), n.args.get("rtol")
    if "tol" in n.args:
        atol, rtol = n.args["tol"], 0.0
    return n.call("matrix_rank", x, n.source(atol), n.source(rtol), repr(bool(n.get("hermitian", False))))


@entry("linalg_lstsq")
def least_squares(n: Operation) -> str:
    """The solution; residuals, rank and singular values where PyTorch's driver returns them."""
    wanted = [repr(item.shape != (0,)) for item in n.node.out[1:]]
    return n.call("least_squares", n["self"], n["b"], n["rcond"], *wanted)
