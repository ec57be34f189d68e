"""One wrong change of the CUDA kernels each, which a test of the emulation must find.

`make mutants` (tools/mutants.py) applies them to a copy. `old` stands once in its file: when an
edit of the kernels changes it, tests/test_mutants.py says so, and the mutant has to follow. `by`:
words, one of which is in the name of the tests that are tried first. Those that change nothing say
why in `equivalent`.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    why: str
    by: str = ""
    equivalent: str = ""


def of(file: str, *changes: tuple[str, ...]) -> list[Mutant]:
    return [Mutant(f"csrc/cuda/{file}", *change) for change in changes]


MEMORY = of(
    "memory.cuh",
    (
        "return static_cast<unsigned>(k) < static_cast<unsigned>(C) ? k : 0;",
        "return k;",
        "an argmax that is no class is followed",
        "argmax_that",
    ),
    (
        "static_cast<unsigned>(k) < static_cast<unsigned>(C) ? k : 0",
        "k < C ? k : 0",
        "a negative argmax is followed",
        "argmax_that",
    ),
    (
        "m.dtype, row * m.row_stride + column * m.col_stride)",
        "m.dtype, static_cast<int>(row * m.row_stride + column * m.col_stride))",
        "32 bits for the offset of an element",
        "inputs_beyond",
    ),
    (
        "static_cast<const char*>(data) + offset * sizeof(T)",
        "static_cast<const char*>(data) + static_cast<int>(offset) * int64_t(sizeof(T))",
        "32 bits for the offset of a vector that is read",
        "beyond",
    ),
    (
        "static_cast<char*>(data) + offset * sizeof(T)",
        "static_cast<char*>(data) + static_cast<int>(offset) * int64_t(sizeof(T))",
        "32 bits for the offset of a vector that is written",
        "beyond",
    ),
    (
        "static_cast<float*>(data)[offset] =",
        "static_cast<float*>(data)[static_cast<int>(offset)] =",
        "32 bits for the offset of an fp32 element that is written",
        "beyond",
    ),
    (
        "static_cast<double*>(data)[offset] =",
        "static_cast<double*>(data)[static_cast<int>(offset)] =",
        "32 bits for the offset of an fp64 element that is written",
        "beyond",
    ),
    (
        "static_cast<unsigned short*>(data)[offset] =",
        "static_cast<unsigned short*>(data)[static_cast<int>(offset)] =",
        "32 bits for the offset of a 16-bit element that is written",
        "beyond",
    ),
    ("return data == nullptr ? 1.0", "return data == nullptr ? 0.0", "no upstream", "upstream"),
    ("m.dtype == Vector<T>::kDtype && ", "", "vectors of another dtype", "mixed"),
    ("m.col_stride == 1 && ", "", "vectors of elements that are apart", "strides"),
    ("width % k == 0 &&\n         ", "", "vectors beyond the row's end", "alignments or regimes"),
    ("m.row_stride % k == 0 && ", "", "vectors of misaligned rows", "alignments"),
    (
        "reinterpret_cast<uintptr_t>(m.data) % 16 == 0",
        "true",
        "vectors of a misaligned matrix",
        "alignments",
    ),
    (
        "reinterpret_cast<uintptr_t>(m.data) % 16 == 0",
        "reinterpret_cast<uintptr_t>(m.data) % 8 == 0",
        "vectors of a matrix that is aligned to half of one",
        "alignments",
    ),
    (
        "x[j] = i < count ? load<float>(m, row, column + i) : lowest(0.0f);",
        "const float any = load<float>(m, row, column + i);\n"
        "      x[j] = i < count ? any : lowest(0.0f);",
        "reads behind the end, and throws away what it read",
        "regimes",
    ),
    ("x[j] = i < count ?", "x[j] = i <= count ?", "a column too many", "regimes"),
    ("if (i < count) store(", "if (i <= count) store(", "writes a column too many", "regimes"),
    ("kLowest = 0xfc00fc00u", "kLowest = 0xfc00u", "padding of fp16 that is 0", "dtypes"),
    ("kLowest = 0xff80ff80u", "kLowest = 0xff800000u", "padding of bf16 that is 0", "dtypes"),
    (
        "x[1] = __uint_as_float(word & 0xffff0000u)",
        "x[1] = __uint_as_float(word)",
        "the lower half of a word in the upper",
        "dtypes or alignments",
    ),
)

REDUCE = of(
    "reduce.cuh",
    (
        "if (x > value || (x == value && at < index))",
        "if (x > value || (x == value && at > index))",
        "the highest of tied classes, one by one",
        "ties",
    ),
    (
        "if (x > value || (x == value && at < index))",
        "if (x > value)",
        "any of tied classes, one by one",
        "ties",
    ),
    (
        "  best = heard[0];\n#pragma unroll\n  for (int mask = kWarp / 2; mask > 0;",
        "  best = heard[0];\n#pragma unroll\n  for (int mask = kWarp / 2; mask > 4;",
        "a block's maximum of the warps is not that of all",
        "dtypes or ties",
    ),
    (
        "  shared[threadIdx.x] = sum;\n  __syncthreads();",
        "  shared[threadIdx.x] = sum;",
        "adds slices that are not there",
        "regimes",
    ),
    (
        "w < kWarps; ++w) sum += shared",
        "w < kWarps - 1; ++w) sum += shared",
        "a slice of parts is not added",
        "regimes",
    ),
    (
        "p < count; p += kWarps",
        "p < count - 1; p += kWarps",
        "the last part's sums of p",
        "regimes",
    ),
    (
        "i < count; i += kAddThreads",
        "i < count - 1; i += kAddThreads",
        "the last part's scalars",
        "regimes",
    ),
    (
        "base + (part + 1) * bytes) - kPartScalars",
        "base + part * bytes)",
        "a part's scalars over its columns",
        "regimes",
    ),
    ("if (f.row_stride == F && has", "if (has", "features with gaps as one row", "features"),
    (
        "flat{f.data, 0, f.col_stride, f.dtype}",
        "flat{f.data, 0, 1, f.dtype}",
        "features that are apart as one row",
        "features",
    ),
    (
        "if (i + j * step < total) bits[j] =",
        "bits[j] =",
        "reads features behind the end",
        "features or regimes",
    ),
    (
        "x[j] = i + j < total ? load<float>",
        "x[j] = true ? load<float>",
        "reads single features behind the end",
        "features or regimes",
    ),
    (
        "load<float>(f, (i + j) / F, (i + j) % F)",
        "load<float>(f, static_cast<int>(i + j) / F, static_cast<int>(i + j) % F)",
        "32 bits for the index of a feature",
        "features_beyond",
    ),
    (
        "  const int64_t total = N * F;\n  double sum = 0;",
        "  const int64_t total = N * F;\n  float sum = 0;",
        "the sum of |f| never moves to fp64",
        "many_features",
    ),
    (
        "y[j] = x[j] > 0 ? up : x[j] < 0 ? -up : 0.0f",
        "y[j] = x[j] < 0 ? -up : up",
        "the sign of 0 is 1",
        "features",
    ),
    (
        "x > 0 ? value : x < 0 ? -value : 0.0",
        "x < 0 ? -value : value",
        "the sign of an fp64 0 is 1",
        "features",
    ),
    (
        "f.dtype == Vector<T>::kDtype && total % kSize == 0;",
        "f.dtype == Vector<T>::kDtype;",
        "writes a gradient's vector behind the end",
        "features or regimes",
    ),
    (
        "f.dtype == Vector<T>::kDtype && total % kSize == 0;",
        "total % kSize == 0;",
        "writes a gradient's vector of another dtype",
        "mixed",
    ),
    (
        "if (i < total) store_vector<T>(grad, i,",
        "store_vector<T>(grad, i,",
        "writes vectors of what was not read",
        "features or alignments",
    ),
    (
        "for (int j = 0; j < kSize && i + j < total; ++j) store(",
        "for (int j = 0; j < kSize; ++j) store(",
        "writes single features behind the end",
        "features or regimes",
    ),
)

ROWS = of(
    "rows.cuh",
    (
        "return row - static_cast<int>(threadIdx.x % kWarp) / R::kLanes < end;",
        "return row < end;",
        "groups that share a warp do not go on together",
        "-33- or 1500",
    ),
    (
        "return R::kLanes == kWarp || row < end;",
        "return true;",
        "another's row is one's own",
        "-33- or 1500",
    ),
    (
        "return R::kLanes == kWarp ? row : min(row, end - 1);",
        "return row;",
        "reads rows behind the last",
        "-33- or 1500",
    ),
    (
        "for (int v = kVectors - 1; v >= 0; --v) {",
        "for (int v = 0; v < kVectors; ++v) {",
        "the highest of a thread's tied vectors",
        "ties",
    ),
    (
        "for (int j = kSize - 1; j >= 0; --j) {",
        "for (int j = 0; j < kSize; ++j) {",
        "the highest of a vector's tied classes",
        "ties",
    ),
    ("          ++*ties;\n", "          *ties = 1;\n", "ties within a thread", "ties"),
    ("first += rank * share;", "first += 0;", "all blocks have the same columns", "16385"),
    (
        "limit = min(C, (rank + 1) * share);",
        "limit = C;",
        "a block goes on with the next one's columns",
        "50257 or 16385",
    ),
    (
        "        if (first + offset(v * kSize) < limit) {\n"
        "          bits[v] = load_vector<T>(m.data, start + offset(v * kSize));\n        }",
        "        const uint4 any = load_vector<T>(m.data, start + offset(v * kSize));\n"
        "        if (first + offset(v * kSize) < limit) bits[v] = any;",
        "reads vectors behind the end, and throws away what it read",
        "alignments or regimes",
    ),
    (
        "if (first + offset(v * kSize) < limit) {",
        "if (first + offset(v * kSize) <= limit) {",
        "a vector too many",
        "alignments or regimes",
    ),
    (
        "const int64_t start = row * m.row_stride + first;",
        "const int start = row * m.row_stride + first;",
        "32 bits for the start of a row that is read",
        "inputs_beyond",
    ),
    (
        "const int64_t start = row * C + first;",
        "const int start = row * C + first;",
        "32 bits for the start of a row that is written",
        "gradients_beyond",
    ),
    ("if (first + at >= limit) continue;", "", "writes vectors behind the end", "alignments"),
    (
        "start + at, bits, limit - first - at)",
        "start + at, bits, kSize)",
        "writes whole vectors of odd rows",
        "-33- or 1500",
    ),
)

GENERATOR = of(
    "generator_loss.cu",
    (
        "sums[0] = mine - mine;  // NaN for an infinity, else 0",
        "sums[0] = 0;",
        "an infinite logit is hidden",
        "nan_and_inf",
    ),
    ("  warp.ties = lane_count<R::kLanes>(warp.ties);\n", "", "ties of one lane", "ties"),
    (
        "  warp.index = lane_min<R::kLanes>(warp.index);\n",
        "",
        "the lowest class of one lane",
        "ties",
    ),
    ("    row.index = lane_min(row.index);\n", "", "the lowest class of one warp", "ties"),
    (
        "        row.ties += one.ties;\n",
        "        row.ties = one.ties;\n",
        "ties of a warp",
        "40000",
    ),
    ("static_cast<float>(row.ties - 1)", "0.0f", "ties are not in d'", "ties"),
    ("  if (row.ties == 0) row.index = 0;\n", "", "no class where there is no number", "infinity"),
    (
        "    if (kLoadAhead && more) load(next);\n    if (!",
        "    if (kLoadAhead) load(next);\n    if (!",
        "reads a row behind the part",
        "dtypes or ties",
    ),
    (
        "if (kLoadAhead && own.any(first, end)) load",
        "if (kLoadAhead) load",
        "reads a row that is not there",
        "dtypes or ties",
    ),
    (
        "    if (!own.has(row, end)) scale = 0;\n",
        "",
        "another's row twice in the sums of p",
        "-33- or 1500",
    ),
    (
        "    if (group.thread == 0 && own.has(row, end)) {",
        "    if (group.thread == 0) {",
        "statistics of a row that is not there",
        "-33- or 1500",
    ),
    (
        "const int64_t end = min(a.N, (part + 1) * part_rows);",
        "const int64_t end = (part + 1) * part_rows;",
        "rows behind the last",
        "-33- or 1500",
    ),
    (
        "    __syncthreads();  // all warps' sums are there\n",
        "",
        "warps do not meet",
        "-33- or 1500",
    ),
    (
        "if (column < own.limit) columns[column] =",
        "columns[column] =",
        "sums of no class",
        "4096 or 9001",
    ),
    (
        "  if (threadIdx.x == 0 && group.thread == 0) {",
        "  if (threadIdx.x == 0) {",
        "each block of a cluster writes the loss",
        "16385",
    ),
    (
        "slope[i] = column < own.limit ? mean[column] : 0.0f;",
        "const float any = mean[column];\n    slope[i] = column < own.limit ? any : 0.0f;",
        "reads means behind the end, and throws away what it read",
        "-33- or 1500",
    ),
    (
        "  centre = group.sum(centre);\n",
        "",
        "a centre a thread",
        "",
        "the centre cancels within each thread: it is there for the rounding of sums",
    ),
    (
        "const int y = now.argmax - own.first;",
        "const int y = now.argmax;",
        "a column of the first thread",
        "-33- or 1500",
    ),
    (
        "static_cast<int64_t>(gridDim.x) / blocks * R::kGroups;",
        "static_cast<int64_t>(gridDim.x) * R::kGroups;",
        "a cluster leaves out rows",
        "16385",
    ),
    (
        "    if (more) ahead = RowStats(stats, a.N, next, C);",
        "    ahead = RowStats(stats, a.N, next, C);",
        "reads statistics of a row before the first",
        "-33- or 1500",
    ),
    (
        "    if (own.has(at, a.N)) {\n      own.store_row",
        "    {\n      own.store_row",
        "writes another's row",
        "",
        "it is row 0, whose gradient all of the warp's groups without a row have formed alike",
    ),
    (
        "return k < a.C ? static_cast<double>(all.columns(p)[k]) : 0.0;",
        "return static_cast<double>(all.columns(p)[k]);",
        "adds columns of no class",
        "-33- or 1500",
    ),
    (
        "if (threadIdx.x < kWarp && k < a.C) static_cast",
        "if (threadIdx.x < kWarp) static_cast",
        "writes means of no class",
        "-33- or 1500",
    ),
    (
        "all.behind(parts)[2 * blockIdx.x] = entropy",
        "all.behind(parts)[0] = entropy",
        "blocks' shares of the entropy in one place",
        "-33- or 1500",
    ),
    (
        "add_scalars(count, block, sums",
        "add_scalars(count - 1, block, sums",
        "a share of the entropy is missing",
        "-33- or 1500",
    ),
)

DISTILL = of(
    "distill_loss.cu",
    ("  __syncthreads();  // all warps' sums are there\n", "", "warps do not meet", "-33- or 1500"),
    (
        "  if constexpr (kOneLaunch) shared.begin_meeting();\n",
        "",
        "waits without arriving",
        "-33- or 1500",
    ),
    ("    shared.end_meeting();\n", "", "blocks send to one that may not run", "-33- or 1500"),
    ("    shared.receive();\n", "", "reads sums that are not there", "-33- or 1500"),
    (
        "} else if (threadIdx.x < kWidth) {",
        "} else if (threadIdx.x <= kWidth) {",
        "a part writes into the next",
        "-33- or 1500",
    ),
    (
        "row = spread_row(); row < a.N;",
        "row = spread_row(); row <= a.N;",
        "a row too many",
        "-33- or 1500",
    ),
    (
        "  warp.index = lane_min<R::kLanes>(warp.index);\n",
        "",
        "the lowest class of one lane",
        "ties",
    ),
    ("  row.index = lane_min(row.index);\n", "", "the lowest class of one warp", "ties"),
    ("      row.ties += one.ties;\n", "      row.ties = one.ties;\n", "ties of a warp", "40000"),
    (
        "if (kLoadAhead && own.any(first, end)) load",
        "if (kLoadAhead) load",
        "reads a row that is not there",
        "dtypes or ties",
    ),
    (
        "if (kLoadAhead && more) load",
        "if (kLoadAhead) load",
        "reads a row behind the part",
        "dtypes or ties",
    ),
    ("if (own.has(row, end)) kl +=", "kl +=", "another's row twice", "-33- or 1500"),
    (
        "    if (group.thread == 0 && own.has(row, end)) {",
        "    if (group.thread == 0) {",
        "statistics of a row that is not there",
        "-33- or 1500",
    ),
    (
        "const int64_t end = min(a.N, (part + 1) * part_rows);",
        "const int64_t end = (part + 1) * part_rows;",
        "rows behind the last",
        "-33- or 1500",
    ),
    (
        "    if (group.thread == 0 && own.has(row, end)) {",
        "    if (threadIdx.x == 0 && own.has(row, end)) {",
        "statistics of the first group's rows alone",
        "-33- or 1500",
    ),
    (
        "  if (threadIdx.x == 0 && group.thread == 0) {",
        "  if (threadIdx.x == 0) {",
        "each block of a cluster writes the loss",
        "ties",
    ),
    (
        "has_vectors<T>(a.student, a.C) && has_vectors<T>(a.teacher, a.C)",
        "has_vectors<T>(a.student, a.C)",
        "vectors of a teacher that has none",
        "alignments",
    ),
    (
        "          if (column < at.end) {\n            bits_s[v] =",
        "          {\n            bits_s[v] =",
        "reads vectors behind the end, and does not use what it read",
        "alignments or regimes",
    ),
    (
        "          if (column < at.end) store_vector<T>(",
        "          store_vector<T>(",
        "writes vectors behind the end",
        "alignments or regimes",
    ),
    (
        "store(a.grad_student, a.student.dtype, at.row * a.C + k, one",
        "store(a.grad_student, a.student.dtype, static_cast<int>(at.row * a.C + k), one",
        "32 bits for the offset in the gradient",
        "gradients_beyond",
    ),
    (
        "const int64_t start_t = at.row * a.teacher.row_stride;",
        "const int start_t = at.row * a.teacher.row_stride;",
        "32 bits for the start of a teacher's row",
        "inputs_beyond",
    ),
    (
        "return student.dtype == teacher.dtype ? student.dtype : Dtype::f32;",
        "return student.dtype;",
        "the student's vectors for a teacher of another dtype",
        "mixed",
    ),
)

DISTILL_ROW = of(
    "distill_row.cuh",
    ("x = fmaxf(a(s, t), -FLT_MAX);", "x = a(s, t);", "0 times infinity", "infinity or regimes"),
    (
        "*agree = index_s == index_t;",
        "*agree = max_s == max_t;",
        "equal maxima for equal classes",
        "regimes",
    ),
    (
        "    if (k < C) row.add_kl(s[k], t[k], kl);",
        "    row.add_kl(s[k], t[k], kl);",
        "divergence of padding",
        "",
        "padding has q_s = q_t = 0, and adds nothing",
    ),
    (
        "    if (k < C) s[k] = row.gradient",
        "    s[k] = row.gradient",
        "gradients of padding",
        "",
        "nothing behind the C-th is stored",
    ),
)

TILE = of(
    "tile.cuh",
    (
        "x[k] = k < C ? from[k * m.col_stride] : lowest(0.0f);",
        "{ const float any = from[k * m.col_stride]; x[k] = k < C ? any : lowest(0.0f); }",
        "reads fp32 columns behind the end, and throws away what it read",
        "regimes",
    ),
    (
        "k < C ? *reinterpret_cast<const unsigned*>(from + k) : 0",
        "*reinterpret_cast<const unsigned*>(from + k)",
        "reads words behind the end, and throws away what it read",
        "dtypes or joint",
    ),
    (
        "bits[k] = k < C ? from[k * m.col_stride] : static_cast<unsigned short>(0);",
        "bits[k] = from[k * m.col_stride];",
        "reads 16-bit columns behind the end, and throws away what it read",
        "-9-",
    ),
    (
        "m.col_stride == 1 && C % 2 == 0",
        "C % 2 == 0",
        "words of elements that are apart",
        "alignments",
    ),
    (
        "m.col_stride == 1 && C % 2 == 0 &&",
        "m.col_stride == 1 &&",
        "words beyond the row's end",
        "",
        "an aligned word that holds an element may be read, and its other half is not used",
    ),
    (" && m.row_stride % 2 == 0 &&", " &&", "words of misaligned rows", "alignments"),
    (
        "reinterpret_cast<uintptr_t>(m.data) % 4 == 0",
        "true",
        "words of a misaligned matrix",
        "alignments",
    ),
    (
        "const int64_t start = row * m.row_stride;",
        "const int start = row * m.row_stride;",
        "32 bits for the start of a row that is read",
        "inputs_beyond",
    ),
    (
        "static_cast<float*>(grad) + row * C;",
        "static_cast<float*>(grad) + static_cast<int>(row * C);",
        "32 bits for the start of an fp32 row that is written",
        "beyond",
    ),
    (
        "static_cast<unsigned short*>(grad) + row * C;",
        "static_cast<unsigned short*>(grad) + static_cast<int>(row * C);",
        "32 bits for the start of a 16-bit row that is written",
        "beyond",
    ),
    ("      if (k < C) to[k] = x[k];", "      to[k] = x[k];", "writes behind the row", "regimes"),
    (
        "if (k + 1 < C) to[k + 1] = high;",
        "to[k + 1] = high;",
        "writes behind odd rows",
        "dtypes or alignments or joint",
    ),
    (
        "    if (C % 2 == 0) {\n      if (k < C) *",
        "    if (true) {\n      if (k < C) *",
        "writes words of odd rows",
        "dtypes or joint",
    ),
    (
        "for (int k = kC - 1; k >= 0; --k) {",
        "for (int k = 0; k < kC; ++k) {",
        "the highest of tied classes",
        "ties",
    ),
    ("  *index = -1;\n", "  *index = 0;\n", "a class where there is no number", "infinity"),
    (
        "const bool upper = lane & mask;",
        "const bool upper = lane & 1;",
        "columns of other lanes",
        "regimes",
    ),
    (
        "for (; mask > 0; mask /= 2) x[0] += shuffle(x[0], mask);",
        "",
        "half of the lanes are not in a column's sum",
        "regimes",
    ),
    (
        "for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) sum",
        "for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp - 1; ++w) sum",
        "the last warp is not added",
        "regimes",
    ),
    ("    if (k < width) {\n", "    {\n", "tells numbers that are none", "regimes"),
    (
        "mailbox_send(gathered + cluster.block_rank() * kTileWidth + k,",
        "mailbox_send(gathered + k,",
        "all blocks in one place",
        "regimes",
    ),
    ("    mailbox_wait(box, 0);\n", "", "adds blocks' sums that are not there", "regimes"),
    ("    if (threadIdx.x == 0) mailbox_open(box);\n", "", "a mailbox stays closed", "regimes"),
    (
        "r < kTileCluster; ++r) sum +=",
        "r < kTileCluster - 1; ++r) sum +=",
        "the last block is not added",
        "regimes",
    ),
    (
        "return !kOneLaunch || threadIdx.x >= kRowThreads;",
        "return true;",
        "threads with rows have features, too",
        "regimes or features",
    ),
)

TILE_LOSSES = of(
    "tile_losses.cu",
    ("  row.argmax = max(row.argmax, 0);\n", "", "no class where there is no number", "infinity"),
    (
        "  shared.put<kC>(warp_columns(columns), C, sums);\n"
        "  __syncthreads();  // all warps' sums are there\n\n"
        "  const int width = C + kGeneratorSums;",
        "  shared.put<kC>(warp_columns(columns), C, sums);\n"
        "  const int width = C + kGeneratorSums;",
        "warps do not meet",
        "regimes",
    ),
    (
        "  shared.put<kC>(warp_columns(columns), C, sums);\n"
        "  __syncthreads();  // all warps' sums are there\n\n"
        "  const int width = C + kPartScalars;",
        "  shared.put<kC>(warp_columns(columns), C, sums);\n  const int width = C + kPartScalars;",
        "warps do not meet, both losses at once",
        "joint",
    ),
    (
        "    shared.slope[k] = lane_slope(k < C ? mean[k] : 0.0f,",
        "    const float any = mean[k];\n    shared.slope[k] = lane_slope(k < C ? any : 0.0f,",
        "reads means behind the end, and throws away what it read",
        "regimes",
    ),
    (
        "  __syncthreads();  // slope[] is complete\n"
        "  const int64_t step = static_cast<int64_t>(gridDim.x) * kTileThreads;\n"
        "  for (int64_t row = spread_row(); row < a.N; row += step) {\n    float p[kC];",
        "  const int64_t step = static_cast<int64_t>(gridDim.x) * kTileThreads;\n"
        "  for (int64_t row = spread_row(); row < a.N; row += step) {\n    float p[kC];",
        "slopes that are not there",
        "regimes",
    ),
    (
        "    __syncthreads();  // slope[] is complete\n    if (has_row)",
        "    if (has_row)",
        "slopes that are not there, both losses in one launch",
        "joint",
    ),
    (
        "  __syncthreads();  // slope[] is complete\n  const GeneratorFactors",
        "  const GeneratorFactors",
        "slopes that are not there, both losses in two launches",
        "joint",
    ),
    (
        "const bool has_row = Roles::has_rows() && row < end;",
        "const bool has_row = Roles::has_rows();",
        "gradients of rows that are not there",
        "joint",
    ),
    (
        "const bool has_row = Roles::has_rows() && row < end;",
        "const bool has_row = row < end;",
        "gradients by threads without rows",
        "joint",
        "a part has at most kTileRows rows, so those of the other threads lie behind its end",
    ),
    (
        "if (kLater && has_row) write_student",
        "if (kLater) write_student",
        "the student's gradient of rows that are not there",
        "joint",
    ),
    (
        "if (Roles::has_rows() && row < end) write_stats",
        "if (Roles::has_rows()) write_stats",
        "statistics of rows that are not there",
        "regimes",
    ),
    (
        "    shared.receive();\n    finish",
        "    finish",
        "slopes from sums that are not there",
        "joint",
    ),
    (
        "    shared.receive();\n    if (blockIdx.x == 0",
        "    if (blockIdx.x == 0",
        "losses from sums that are not there",
        "regimes",
    ),
    ("warp == 1 && blockIdx.x == 0", "warp == 1", "each block writes the losses", "joint"),
    (
        "  if (class_mean != nullptr && lane < a.C)",
        "  if (class_mean != nullptr)",
        "means of no class",
        "regimes",
    ),
    (
        "return lane < C ? static_cast<double>(all.columns(p)[lane]) : 0.0;",
        "return static_cast<double>(all.columns(p)[lane]);",
        "reads sums of no class",
        "joint",
    ),
)

GROUP = of(
    "group.cuh",
    (
        "kAllLanes = 0xffffffffu",
        "kAllLanes = 0x0000ffffu",
        "half a shuffle mask",
        "regimes",
    ),
    (
        "words[1] = __shfl_xor_sync(kAllLanes, words[1], mask)",
        "words[1] = __shfl_xor_sync(kAllLanes, words[0], mask)",
        "a double's lower word twice",
        "regimes",
    ),
    (
        "mask > 0; mask /= 2) value += shuffle(value, mask)",
        "mask > 1; mask /= 2) value += shuffle(value, mask)",
        "a step of a warp's sum is missing",
        "regimes",
    ),
    (
        "mask > 0; mask /= 2) value = fmaxf(",
        "mask > 1; mask /= 2) value = fmaxf(",
        "a step of a warp's maximum is missing",
        "100",
    ),
    (
        "leave too early: it has waited for all that is sent to it.\n      cluster.sync();",
        "leave too early: it has waited for all that is sent to it.",
        "blocks of a cluster do not meet before they write to one another",
        "20000 or 16385",
    ),
    ("    turn ^= 1;\n", "", "one set of slots instead of two", "regimes"),
    ("if (lane < blocks) {", "if (lane < blocks - 1) {", "a block is told nothing", "16385"),
    ("if (lane < blocks) {", "if (lane <= blocks) {", "tells a block that is not there", "16385"),
    (
        "mailbox_send(set + cluster.block_rank() * R::kWarps + warp,",
        "mailbox_send(set + cluster.block_rank() + warp,",
        "two blocks' warps in one slot",
        "16385",
    ),
    (
        "      mailbox_wait(box, phases >> turn & 1);\n",
        "",
        "reads what other blocks tell before they have",
        "16385",
    ),
    ("      phases ^= 1u << turn;\n", "", "waits for a phase that has ended long ago", "16500"),
    ("mailbox_open(mailbox(1));", "", "a mailbox stays closed", "16385"),
    (
        "if (threadIdx.x == 0) mailbox_expect(box,",
        "if (lane == 0) mailbox_expect(box,",
        "each warp says how much the block expects",
        "16385",
    ),
    (
        "mailbox_expect(box, warps * sizeof(V))",
        "mailbox_expect(box, (warps - 1) * sizeof(V))",
        "does not wait for the last warp",
        "16385",
    ),
    (
        "    value = lane_sum<R::kLanes>(value);\n",
        "    value = lane_sum(value);\n",
        "rows that share a warp in one sum",
        "regimes",
    ),
    (
        "mask > 0; mask /= 2) value = min(",
        "mask > 1; mask /= 2) value = min(",
        "a step of the lowest class of a few lanes is missing",
        "ties",
    ),
    (
        "      if (lane == 0) set[warp] = value;\n      __syncthreads();",
        "      if (lane == 0) set[warp] = value;",
        "reads what other warps tell before they have",
        "regimes",
    ),
    ("heard[i] = at < warps ? set[at] : none", "heard[i] = set[at]", "slots of no warp", "regimes"),
)

GENERATOR_STREAM = of(
    "generator_stream.cuh",
    ("  if (k >= a.C) return;", "  if (k > a.C) return;", "a class too many", "dtypes or 20000"),
    (
        "others += row_math::others_term(k == best.index, shifted, exp_of(shifted));",
        "others += exp_of(shifted);",
        "the argmax in d'",
        "dtypes",
    ),
    (
        "row < a.N; row += gridDim.x",
        "row < a.N - 1; row += gridDim.x",
        "not the last row",
        "dtypes",
    ),
)

DISTILL_STREAM = of(
    "distill_stream.cuh",
    (
        "segments == 1 ? C : min(C, begin + kSegment)",
        "segments == 1 ? C : begin + kSegment",
        "a row's last segment goes on into the next row",
        "-33- or 1500",
    ),
)

MUTANTS = [
    *MEMORY,
    *GROUP,
    *REDUCE,
    *ROWS,
    *GENERATOR,
    *GENERATOR_STREAM,
    *DISTILL,
    *DISTILL_STREAM,
    *DISTILL_ROW,
    *TILE,
    *TILE_LOSSES,
]
