"""Calls of operators that compute: products, norms, elementwise operators, reductions, losses."""

from __future__ import annotations

import torch
import transformers.integrations.moe  # noqa: F401 -- registers its operator

from tests.helpers.rules_case import case, ints, mask, p, x, z

# Products.
case("linear", "2 3 5 +7", lambda: (x(2, 3, 7), x(5, 7)))
case("linear", "2 3 5 +7", lambda: (x(2, 3, 7), x(5, 7), x(5)))
case("linear", "5 +7", lambda: (x(7), x(5, 7)))
case("matmul", "2 3 5 +7", lambda: (x(2, 3, 7), x(7, 5)))
case("matmul", "2 4 3 5 +7", lambda: (x(2, 1, 3, 7), x(4, 7, 5)))
case("matmul", "+7", lambda: (x(7), x(7)))
case("matmul", "2 3 +7", lambda: (x(2, 3, 7), x(7)))
case("matmul", "2 5 +7", lambda: (x(7), x(2, 7, 5)))
case("mm", "3 5 +7", lambda: (x(3, 7), x(7, 5)))
case("bmm", "2 3 5 +7", lambda: (x(2, 3, 7), x(2, 7, 5)))
case("mv", "3 +7", lambda: (x(3, 7), x(7)))
case("dot", "+7", lambda: (x(7), x(7)))
case("outer", "3 5", lambda: (x(3), x(5)))
case("addmm", "3 5 +7", lambda: (x(5), x(3, 7), x(7, 5)), alpha=2, beta=3)
case("addmm", "3 5 +7", lambda: (x(3, 5), x(3, 7), x(7, 5)), beta=0.5)
case("addmm", "3 5 +7", lambda: (x(3, 1), x(3, 7), x(7, 5)))
case("addmv", "3 +7", lambda: (x(3), x(3, 7), x(7)))
case("baddbmm", "2 3 5 +7", lambda: (x(2, 1, 5), x(2, 3, 7), x(2, 7, 5)))
case("einsum", "2 3 5 +7 +4", lambda: ("bijk,bkjn->bin", [x(2, 3, 4, 7), x(2, 7, 4, 5)]))
case("einsum", "2 3 5 +7", lambda: ("...ik, ...kn", [x(2, 3, 7), x(2, 7, 5)]))
case("einsum", None, lambda: ("ii->i", [x(3, 3)]))
case("cdist", "2 3 5", lambda: (x(2, 3, 7), x(2, 5, 7)))
case("meshgrid", "3 5", lambda: ([x(3), x(5)],))
case("meshgrid.indexing", None, lambda: ([x(3), x(5)],), indexing="xy")
case("conv1d", "2 +3 5 5", lambda: (x(2, 3, 11), x(5, 3, 4), None, [2], [1]))
case("conv2d", "2 +3 5 5 4", lambda: (x(2, 3, 7, 8), x(5, 3, 3, 2), x(5), [1, 2], [1, 0], [2, 1]))
case("conv2d", "2 +3 5 5 7", lambda: (x(2, 3, 7, 8), x(5, 3, 3, 2)))
case("conv2d", "+3 5 5 7", lambda: (x(3, 7, 8), x(5, 3, 3, 2)))
case("conv2d", "2 3 +2 3 5 7", lambda: (x(2, 6, 7, 8), x(9, 2, 3, 2), None, [1, 1], [0, 0], [1, 1], 3))
case("conv2d.padding", "2 +3 5 7 8", lambda: (x(2, 3, 7, 8), x(5, 3, 3, 3), x(5), [1, 1], "same"))
case("conv2d.padding", "2 +3 5 8 7", lambda: (x(2, 3, 8, 7), x(5, 3, 4, 2), None, [1, 1], "same", [2, 1]))
case("conv2d.padding", "2 +3 5 3 6", lambda: (x(2, 3, 7, 7), x(5, 3, 3, 2), x(5), [2, 1], "valid"))
case("conv2d", "2 +3 5 7", lambda: (x(2, 3, 4, 7), x(5, 3, 1, 1), x(5), [1, 1], [1, 0]))
case("conv2d", "2 +3 5 2 4", lambda: (x(2, 3, 4, 7), x(5, 3, 1, 1), None, [2, 2]))
case("conv3d", "2 +3 5 3 5 7", lambda: (x(2, 3, 4, 7, 8), x(5, 3, 2, 3, 2)))
case(
    "convolution", "2 +3 5 5 7", lambda: (x(2, 3, 7, 8), x(5, 3, 3, 2), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
)
case("convolution", "2 +3 5", lambda: (x(2, 3, 7, 8), x(3, 5, 3, 2), x(5), [2, 1], [0, 0], [1, 1], True, [1, 0], 1))
case("conv_transpose2d.input", "2 5 +3", lambda: (x(2, 3, 7, 8), x(3, 5, 3, 2)))
case("conv_transpose2d.input", "2 3 +2 2", lambda: (x(2, 6, 7, 8), x(6, 2, 3, 2), None, [1, 1], [0, 0], [0, 0], 3))
case("scaled_dot_product_attention", "2 4 3 6", lambda: (x(2, 4, 3, 8), x(2, 4, 5, 8), x(2, 4, 5, 6)))
case("scaled_dot_product_attention", "2 4 5 6", lambda: (x(2, 4, 5, 8), x(2, 4, 5, 8), x(2, 4, 5, 6), None, 0.0, True))
case(
    "scaled_dot_product_attention",
    "2 4 3 8",
    lambda: (x(2, 4, 3, 8), x(2, 4, 5, 8), x(2, 4, 5, 8), x(2, 1, 3, 5)),
    scale=0.3,
)
case(
    "scaled_dot_product_attention", "2 4 3 8", lambda: (x(2, 4, 3, 8), x(2, 4, 5, 8), x(2, 4, 5, 8), mask(3, 5) | True)
)
case(
    "scaled_dot_product_attention",
    "2 3 2 5 8",
    lambda: (x(2, 6, 5, 8), x(2, 3, 7, 8), x(2, 3, 7, 8), x(2, 6, 5, 7)),
    enable_gqa=True,
)
case(
    "scaled_dot_product_attention",
    "2 3 2 5 8",
    lambda: (x(2, 6, 5, 8), x(2, 3, 5, 8), x(2, 3, 5, 8), None, 0.0, True),
    enable_gqa=True,
)
case("scaled_dot_product_attention", "3 5 8", lambda: (x(3, 5, 8), x(3, 4, 8), x(3, 4, 8), None, 0.0, True), scale=0.3)
case(
    "scaled_dot_product_attention",
    "2 8",
    lambda: (x(2, 5, 4), x(2, 5, 4), x(2, 5, 8), None, 0.1, True),
    shape_only=True,
)
case("scaled_dot_product_attention", "2 3 8", lambda: (x(2, 3, 8), x(2, 5, 8), x(2, 5, 8)))
case(
    "lstm.input",
    "4",
    lambda: (
        x(5, 4, 3),
        [x(2, 4, 6), x(2, 4, 6)],
        [x(24, 3), x(24, 6), x(24), x(24), x(24, 6), x(24, 6), x(24), x(24)],
        True,
        2,
        0.0,
        False,
        False,
        False,
    ),
)
case(
    "gru.input",
    "4",
    lambda: (x(4, 5, 3), x(2, 4, 6), [x(18, 3), x(18, 6), x(18, 3), x(18, 6)], False, 1, 0.0, False, True, True),
)
# Pooling and resampling.
case("max_pool1d", "2 3 4", lambda: (x(2, 3, 9), [3], [2]))
case("max_pool2d", "2 3 4 9", lambda: (x(2, 3, 7, 8), [3, 2], [2, 1], [1, 1]))
case("max_pool2d_with_indices", "2 3", lambda: (x(2, 3, 7, 8), [3, 2]))
case("avg_pool2d", "2 3 2 4", lambda: (x(2, 3, 7, 8), [3, 2]))
case("avg_pool2d", "3 2 4", lambda: (x(3, 7, 8), [3, 2]))
case("adaptive_avg_pool2d", "2 3", lambda: (x(2, 3, 7, 8), [1, 1]))
case("adaptive_max_pool2d", "2 3", lambda: (x(2, 3, 7, 8), [2, 3]))
case("upsample_nearest2d", "2 3 4 5", lambda: (x(2, 3, 4, 5), [8, 10]))
case("upsample_bilinear2d", "2 3", lambda: (x(2, 3, 4, 5), [7, 9], False))
case("upsample_bicubic2d.vec", "2 3", lambda: (x(2, 3, 4, 5), None, False, [2.0, 2.0]))
case("reflection_pad2d", "2 3", lambda: (x(2, 3, 4, 5), [1, 2, 0, 1]))
case("pixel_shuffle", "2 3 5 7", lambda: (x(2, 12, 5, 7), 2))
case("pixel_unshuffle", "2 3 5 4", lambda: (x(2, 3, 10, 8), 2))
case("im2col", "2 3", lambda: (x(2, 3, 7, 8), [3, 2], [1, 1], [0, 0], [1, 1]))
case("grid_sampler", "2 3 4 6", lambda: (x(2, 3, 5, 7), x(2, 4, 6, 2), 0, 0, False))
case("max_pool2d", "2 3 5 4", lambda: (x(2, 3, 8, 8), [3, 3], [2, 2], [1, 1], [1, 2], True))
case("max_pool2d", "3 5 4", lambda: (ints(9, 3, 9, 8), [2, 2], [2, 2], [1, 0], [1, 1], True))
case("avg_pool2d", "2 3 4 3", lambda: (x(2, 3, 7, 9), [3, 3], [2, 3], [1, 0], False, True))
case("avg_pool2d", "2 3 3", lambda: (x(2, 3, 7, 9), [3, 3], [2, 3], [1, 0], False, False))
case("avg_pool2d", "2 3 5", lambda: (x(2, 3, 8, 9), [3, 2], [3, 2], [0, 1], True, True))
case("avg_pool2d", "2 3 4 5", lambda: (x(2, 3, 7, 9), [3, 3], [2, 2], [1, 1], True, False, 7))
case("adaptive_avg_pool2d", "2 3 4 3", lambda: (x(2, 3, 8, 6), [4, 3]))
case("adaptive_avg_pool1d", "3 4", lambda: (x(3, 12), [4]))
case("upsample_nearest2d.vec", "2 3 4 5", lambda: (x(2, 3, 4, 5), None, [2.0, 3.0]))
case("upsample_nearest2d.vec", "2 3 5", lambda: (x(2, 3, 4, 5), None, [1.6, 2.0]))
case("_upsample_nearest_exact1d", "2 3 5", lambda: (x(2, 3, 5), [15]))
# Normalizations.
case("layer_norm", "2 3", lambda: (x(2, 3, 5), [5], x(5), x(5)))
case("layer_norm", "2", lambda: (x(2, 3, 5), [3, 5]))
case("native_layer_norm", "2 3", lambda: (x(2, 3, 5), [5], x(5), None, 1e-5))
case("rms_norm", "2 3", lambda: (x(2, 3, 5), [5], x(5), 1e-5))
case("_fused_rms_norm", "2 3", lambda: (x(2, 3, 5), [5], x(5), 1e-5))
case("group_norm", "2 3", lambda: (x(2, 6, 5), 3, x(6), x(6)))
case("native_group_norm", "2 3", lambda: (x(2, 6, 5), None, None, 2, 6, 5, 3, 1e-5))
case("instance_norm", "2 3", lambda: (x(2, 3, 5, 4), x(3), x(3), None, None, True, 0.1, 1e-5, False))
case("batch_norm", "3", lambda: (x(2, 3, 5, 4), x(3), x(3), x(3), p(3), True, 0.1, 1e-5, False))
case("batch_norm", "2 3 5 4", lambda: (x(2, 3, 5, 4), x(3), x(3), x(3), p(3), False, 0.1, 1e-5, False))
case("batch_norm", "3", lambda: (x(2, 3), None, None, None, None, True, 0.1, 1e-5, False))
case("_native_batch_norm_legit_functional", "3 *2 *5", lambda: (x(2, 3, 5), x(3), x(3), x(3), p(3), True, 0.1, 1e-5))
case("_native_batch_norm_legit_functional", "3", lambda: (x(2, 3, 5), x(3), x(3), x(3), p(3), False, 0.1, 1e-5))
case("_native_batch_norm_legit_no_training", "2 3 5", lambda: (x(2, 3, 5), x(3), x(3), x(3), p(3), 0.1, 1e-5))
case("native_batch_norm", "3", lambda: (x(2, 3, 5), x(3), x(3), x(3), p(3), True, 0.1, 1e-5))
# Elementwise.
case("add.Tensor", "2 3 5", lambda: (x(2, 3, 5), x(3, 1)), alpha=2)
case("add.Tensor", "3", lambda: (x(3), 1.5))
case("add.Scalar", "3", lambda: (x(3), 1.5))
case("sub.Tensor", "2 5", lambda: (x(2, 1), x(1, 5)))
case("rsub.Scalar", "3", lambda: (x(3), 1.5))
case("mul.Tensor", "2 3", lambda: (x(2, 3), x()))
case("mul.Scalar", "2 3", lambda: (x(2, 3), 2.5))
case("div.Tensor", "2 3", lambda: (x(2, 3), p(3)))
case("div.Tensor_mode", "2 3", lambda: (x(2, 3), p(3)), rounding_mode="floor")
case("neg", "2 3", lambda: (x(2, 3),))
case("gelu", "2 3", lambda: (x(2, 3),))
case("pow.Tensor_Scalar", "2 3", lambda: (x(2, 3), 2))
case("where.self", "2 3 5", lambda: (mask(2, 1, 5), x(3, 5), x()))
case("where.ScalarOther", "2 3", lambda: (mask(2, 3), x(3), 0.0))
case("masked_fill.Scalar", "2 3", lambda: (x(2, 3), mask(2, 1), -1.0))
case("masked_fill.Scalar", "2 3", lambda: (x(2, 3), mask(2, 1), 0))
case("masked_fill.Tensor", "2 3", lambda: (x(2, 3), mask(2, 1), x()))
case("clamp", "2 3", lambda: (x(2, 3), -0.5, 0.5))
case("clamp.Tensor", "2 3", lambda: (x(2, 3), x(3)))
case("lerp.Scalar", "2 3", lambda: (x(2, 3), x(3), 0.3))
case("lerp.Tensor", "2 3", lambda: (x(2, 3), x(3), p(2, 1)))
case("addcmul", "2 3", lambda: (x(2, 3), x(3), x(2, 1)), value=2)
case("addcdiv", "2 3", lambda: (x(2, 3), x(3), p(2, 1)))
case("maximum", "2 3", lambda: (x(2, 3), x(3)))
case("max.other", "2 3", lambda: (x(2, 3), x(3)))
case("eq.Tensor", "2 3", lambda: (ints(2, 2, 3), ints(2, 3)))
case("__and__.Tensor", "2 3", lambda: (mask(2, 3), mask(3)))
case("floor_divide", "2 3", lambda: (ints(9, 2, 3), 2))
case("clone", "2 3", lambda: (x(2, 3),))
case("alias", "2 3", lambda: (x(2, 3),))
case("detach", "2 3", lambda: (x(2, 3),))
case("_to_copy", "2 3", lambda: (x(2, 3),), dtype=torch.float32)
case("copy", "2 3", lambda: (x(2, 3), x(3)))
case("fill.Tensor", "2 3", lambda: (x(2, 3), x()))
case("expand_as", "2 3", lambda: (x(3), x(2, 3)))
case("zeros_like", "2 3", lambda: (x(2, 3),))
case("full_like", "2 3", lambda: (x(2, 3), 3.0))
case("empty_like", "2 3", lambda: (x(2, 3),), shape_only=True)
case("native_dropout", "2 3", lambda: (x(2, 3), 0.5, True), shape_only=True)
case("dropout", "2 3", lambda: (x(2, 3), 0.5, False))
case("bernoulli.p", "2 3", lambda: (x(2, 3), 0.5), shape_only=True)
case("prelu", "2 3 5", lambda: (x(2, 3, 5), x(3)))
case("prelu", "2 3 5", lambda: (x(2, 3, 5), x(1)))
case("glu", "2 3", lambda: (x(2, 6), -1))
case("cosine_similarity", "2 4", lambda: (x(2, 1, 5), x(4, 5), -1))
# Along an axis.
case("softmax.int", "2 5", lambda: (x(2, 3, 5), 1))
case("_softmax", "2 3", lambda: (x(2, 3, 5), -1, False))
case("log_softmax.int", "2 3", lambda: (x(2, 3, 5), -1))
case("cumsum", "2 5", lambda: (x(2, 3, 5), 1))
case("cumprod", "2 5", lambda: (x(2, 3, 5), 1))
case("cummax", "2 5", lambda: (x(2, 3, 5), 1))
case("sort", "2 3", lambda: (x(2, 3, 5),))
case("sort.stable", "3 5", lambda: (x(2, 3, 5),), stable=True, dim=0)
case("argsort", "2 3", lambda: (x(2, 3, 5), -1, True))
case("flip", "3", lambda: (x(2, 3, 5), [0, 2]))
case("roll", "2 3", lambda: (x(2, 3, 5), [2], [-1]))
case("roll", "", lambda: (x(2, 3, 5), [2]))
case("tril", "2", lambda: (x(2, 3, 5), 1))
case("triu", "2", lambda: (x(2, 3, 5),))
# Reductions.
case("sum", "+2 +3", lambda: (x(2, 3),))
case("sum.dim_IntList", "2 5 +3", lambda: (x(2, 3, 5), [1]))
case("sum.dim_IntList", "3 +2 +5", lambda: (x(2, 3, 5), [-1, 0], True))
case("sum.dim_IntList", "+2 +3", lambda: (x(2, 3), None))
case("count_nonzero", "2 +3", lambda: (ints(2, 2, 3), 1))
case("mean", "*2 *3", lambda: (x(2, 3),))
case("mean.dim", "2 *3", lambda: (x(2, 3), [-1], True))
case("amax", "2 5", lambda: (x(2, 3, 5), [1]))
case("amin", "", lambda: (x(2, 3, 5),))
case("prod.dim_int", "2 5", lambda: (x(2, 3, 5), 1))
case("any.dim", "2 5", lambda: (mask(2, 3, 5), 1, True))
case("any.dims", "2", lambda: (mask(2, 3, 5), [1, 2]))
case("all", "", lambda: (mask(2, 3),))
case("argmax", "2 5", lambda: (x(2, 3, 5), 1))
case("argmax", "", lambda: (x(2, 3, 5),))
case("max.dim", "2 5", lambda: (x(2, 3, 5), 1))
case("var.correction", "2 3", lambda: (x(2, 3, 5), [-1]), correction=0, keepdim=True)
case("var", "", lambda: (x(2, 3), False))
case("std.dim", "3", lambda: (x(2, 3, 5), [0, 2], True))
case("var_mean.correction", "2 3", lambda: (x(2, 3, 5), [-1]))
case("norm.ScalarOpt_dim", "2", lambda: (x(2, 3), 2, [1]))
case("linalg_vector_norm", "2", lambda: (x(2, 3), 2, [1], True))
case("logsumexp", "2 3", lambda: (x(2, 3, 5), [-1]))
case("topk", "2 3", lambda: (x(2, 3, 5), 2))
case("topk", "3 5", lambda: (x(2, 3, 5), 1, 0))
case("kthvalue", "2 3", lambda: (x(2, 3, 5), 2))
case("multinomial", "2", lambda: (p(2, 5), 3), shape_only=True)
case("histc", "+9", lambda: (x(9), 4, -1, 1))
case("histc", "", lambda: (x(9), 4))

# Norms of matrices, spectra, weights; cells.
case("linalg_norm", "2", lambda: (x(2, 3, 5), None, [1, 2]))
case("linalg_norm", "2 3", lambda: (x(2, 3, 5), 3, [2], True))
case("linalg_norm", "", lambda: (x(3, 5),))
case("linalg_norm.ord_str", "3", lambda: (x(2, 3, 5), "nuc", [0, 2]))
case("linalg_matrix_norm", "4 2", lambda: (x(4, 2, 3, 5), 2))
case("linalg_matrix_norm.str_ord", "3", lambda: (x(2, 3, 5), "fro", [0, 2], True))
case("linalg_vector_norm", "2 5", lambda: (x(2, 3, 5), 2, [1]))
case("_weight_norm_interface", "3", lambda: (x(3, 4, 5), x(3, 1, 1)))
case("_weight_norm_interface", "5", lambda: (x(3, 4, 5), x(1, 1, 5), 2))
case("_weight_norm", "3", lambda: (x(3, 4), x(3, 1), 0))
case("polar", "2 3", lambda: (p(2, 3), x(2, 3)))
case("complex", "2 3", lambda: (x(2, 3), x(2, 3)))
case("fft_fft", "2 3", lambda: (x(2, 3, 5),))
case("fft_rfft", "2 5", lambda: (x(2, 3, 5), 4, 1))
case("fft_irfft", "2 3", lambda: (z(2, 3, 5), None, -1, "ortho"))
case("fft_fft2", "2", lambda: (z(2, 3, 5),))
case("fft_rfftn", "2", lambda: (x(2, 3, 5), [4, 4]))
case("fft_ifftn", "3", lambda: (z(2, 3, 5), None, [0, 2]))
case("fft_fftshift", "2 5", lambda: (x(2, 3, 5), [1]))
case("_fft_r2c", "2 3", lambda: (x(2, 3, 5), [2], 0, True))
case("_fft_c2r", "3 5", lambda: (z(2, 3, 5), [0], 0, 3))
case("_fft_c2c", "5", lambda: (z(2, 3, 5), [0, 1], 0, True))
case("lstm_cell", "2", lambda: (x(2, 3), [x(2, 4), x(2, 4)], x(16, 3), x(16, 4), x(16), x(16)))
case("gru_cell", "2", lambda: (x(2, 3), x(2, 4), x(12, 3), x(12, 4), x(12), x(12)))
case("rnn_tanh_cell", "2", lambda: (x(2, 3), x(2, 4), x(4, 3), x(4, 4)))
case("_native_batch_norm_legit.no_stats", "3 *2 *4", lambda: (x(2, 3, 4), x(3), x(3), True, 0.1, 1e-5))
