/* The products of matmul.c as an operator of ONNX Runtime: cxr_triton.W4A8MatMul(x, weights, scales, bias?) → y.
 *
 * ONNX Runtime's package brings no headers. Of its C interface, to whose tables later versions only append, what is used
 * here is declared by its place: https://onnxruntime.ai/docs/api/c/struct_ort_api.html, struct_ort_custom_op.html. */
#include "matmul.h"

#include <stdlib.h>

#define VERSION 17 /* of the interface: the first with KernelContext_ParallelFor */

typedef struct status status;
typedef struct value value;
typedef struct context context;
typedef void (*function)(void);
/* A function of the interface by its place and parameters; most give NULL where nothing failed. */
#define CALL(api, place, ...) ((status *(*)(__VA_ARGS__))(api)[place])
#define TRY(call)                   \
    do {                            \
        status *failed = (call);    \
        if (failed)                 \
            return failed;          \
    } while (0)

enum place {
    CREATE_STATUS = 0,
    CREATE_CUSTOM_OP_DOMAIN = 26,
    CUSTOM_OP_DOMAIN_ADD = 27,
    ADD_CUSTOM_OP_DOMAIN = 28,
    GET_TENSOR_MUTABLE_DATA = 51,
    GET_DIMENSIONS_COUNT = 61,
    GET_DIMENSIONS = 62,
    GET_TENSOR_SHAPE_ELEMENT_COUNT = 64,
    GET_TENSOR_TYPE_AND_SHAPE = 65,
    KERNEL_INFO_GET_ATTRIBUTE_INT64 = 86,
    KERNEL_CONTEXT_GET_INPUT = 90,
    KERNEL_CONTEXT_GET_OUTPUT = 91,
    RELEASE_TENSOR_TYPE_AND_SHAPE_INFO = 99,
    KERNEL_CONTEXT_PARALLEL_FOR = 274,
};
enum { FLOAT = 1, UINT8 = 2, INVALID_ARGUMENT = 2, REQUIRED = 0, OPTIONAL = 1, MEMORY_DEFAULT = 0 };
#define MOST_DIMENSIONS 8

typedef struct {
    const function *(*get_api)(uint32_t version);
    const char *(*version)(void);
} api_base;

struct operator {
    uint32_t version;
    void *(*create)(const struct operator *, const function *, const void *);
    const char *(*name)(const struct operator *);
    const char *(*provider)(const struct operator *);
    int (*input_type)(const struct operator *, size_t);
    size_t (*input_count)(const struct operator *);
    int (*output_type)(const struct operator *, size_t);
    size_t (*output_count)(const struct operator *);
    void (*compute)(void *, context *);
    void (*destroy)(void *);
    int (*input_kind)(const struct operator *, size_t);
    int (*output_kind)(const struct operator *, size_t);
    int (*input_memory)(const struct operator *, size_t);
    int (*variadic[4])(const struct operator *);
    status *(*create_v2)(const struct operator *, const function *, const void *, void **);
    status *(*compute_v2)(void *, context *);
    status *(*infer_shape)(const struct operator *, void *);
    int (*start_version)(const struct operator *);
    int (*end_version)(const struct operator *);
};

typedef struct {
    const function *api;
    int64_t inputs, outputs, block, gated;
} kernel;

static status *refuse(const function *api, const char *why)
{
    return CALL(api, CREATE_STATUS, int, const char *)(INVALID_ARGUMENT, why);
}

static status *create(const struct operator *op, const function *api, const void *info, void **made)
{
    (void)op;
    kernel sizes = {.api = api};
    const struct {
        const char *name;
        int64_t *value;
    } sought[] = {{"K", &sizes.inputs}, {"N", &sizes.outputs}, {"block_size", &sizes.block}, {"gated", &sizes.gated}};
    for (size_t i = 0; i < sizeof sought / sizeof *sought; i++)
        TRY(CALL(api, KERNEL_INFO_GET_ATTRIBUTE_INT64, const void *, const char *, int64_t *)(
            info, sought[i].name, sought[i].value));
    if (!matmul_takes(sizes.inputs, sizes.outputs, sizes.block, sizes.gated))
        return refuse(api, "W4A8MatMul: K, N, block_size and gated are not what it multiplies");
    kernel *own = malloc(sizeof *own);
    if (!own)
        return refuse(api, "W4A8MatMul: out of memory");
    *own = sizes;
    *made = own;
    return NULL;
}

/* An input's data, with its shape; NULL where it is not given. */
static status *tensor(
    const function *api, context *run, size_t index, void **data, size_t *elements, int64_t *shape, size_t *dimensions)
{
    value *given = NULL;
    TRY(CALL(api, KERNEL_CONTEXT_GET_INPUT, context *, size_t, value **)(run, index, &given));
    *data = NULL;
    if (!given)
        return NULL;
    void *info;
    TRY(CALL(api, GET_TENSOR_TYPE_AND_SHAPE, value *, void **)(given, &info));
    status *failed = CALL(api, GET_TENSOR_SHAPE_ELEMENT_COUNT, void *, size_t *)(info, elements);
    if (!failed && dimensions)
        failed = CALL(api, GET_DIMENSIONS_COUNT, void *, size_t *)(info, dimensions);
    if (!failed && dimensions && *dimensions > MOST_DIMENSIONS)
        failed = refuse(api, "W4A8MatMul: x has too many dimensions");
    if (!failed && dimensions)
        failed = CALL(api, GET_DIMENSIONS, void *, int64_t *, size_t)(info, shape, *dimensions);
    ((void (*)(void *))api[RELEASE_TENSOR_TYPE_AND_SHAPE_INFO])(info);
    TRY(failed);
    return CALL(api, GET_TENSOR_MUTABLE_DATA, value *, void **)(given, data);
}

static void round_one(void *m, size_t tile)
{
    matmul_round(m, tile);
}

static void multiply_one(void *m, size_t task)
{
    matmul_multiply(m, task);
}

static status *compute(void *made, context *run)
{
    const kernel *own = made;
    const function *api = own->api;
    void *x, *weights, *scales, *bias, *y;
    size_t elements, weight_bytes, scale_count, bias_count, dimensions;
    int64_t shape[MOST_DIMENSIONS];
    TRY(tensor(api, run, 0, &x, &elements, shape, &dimensions));
    TRY(tensor(api, run, 1, &weights, &weight_bytes, NULL, NULL));
    TRY(tensor(api, run, 2, &scales, &scale_count, NULL, NULL));
    TRY(tensor(api, run, 3, &bias, &bias_count, NULL, NULL));
    if (!dimensions || shape[dimensions - 1] != own->inputs)
        return refuse(api, "W4A8MatMul: the last dimension of x is not K");
    matmul m = {
        .rows = elements / own->inputs,
        .inputs = own->inputs,
        .outputs = own->outputs,
        .block = own->block,
        .gated = own->gated,
        .x = x,
        .weights = weights,
        .scales = scales,
        .bias = bias,
    };
    size_t padded = matmul_panels(&m) * PANEL;
    if (weight_bytes != padded * own->inputs / 2 || scale_count != padded * (own->inputs / own->block))
        return refuse(api, "W4A8MatMul: weights or scales are not of K by N");
    if (bias && (own->gated || bias_count != (size_t)own->outputs))
        return refuse(api, "W4A8MatMul: the bias is not of N, or beside a gate");
    shape[dimensions - 1] = own->outputs;
    value *result;
    TRY(CALL(api, KERNEL_CONTEXT_GET_OUTPUT, context *, size_t, const int64_t *, size_t, value **)(
        run, 0, shape, dimensions, &result));
    TRY(CALL(api, GET_TENSOR_MUTABLE_DATA, value *, void **)(result, &y));
    m.y = y;
    if (!m.rows)
        return NULL;
    void *memory = aligned_alloc(64, matmul_plan(&m));
    if (!memory)
        return refuse(api, "W4A8MatMul: out of memory");
    matmul_place(&m, memory);
    status *failed = NULL;
    if (m.tiles == 1) /* sooner done than shared */
        matmul_round(&m, 0);
    else
        failed = CALL(api, KERNEL_CONTEXT_PARALLEL_FOR, context *, void (*)(void *, size_t), size_t, size_t, void *)(
            run, round_one, m.tiles, 0, &m);
    if (!failed)
        failed = CALL(api, KERNEL_CONTEXT_PARALLEL_FOR, context *, void (*)(void *, size_t), size_t, size_t, void *)(
            run, multiply_one, m.tasks, 0, &m);
    free(memory);
    return failed;
}

static const char *name(const struct operator *op)
{
    (void)op;
    return "W4A8MatMul";
}

static const char *provider(const struct operator *op)
{
    (void)op;
    return "CPUExecutionProvider";
}

static size_t input_count(const struct operator *op)
{
    (void)op;
    return 4;
}

static size_t output_count(const struct operator *op)
{
    (void)op;
    return 1;
}

static int input_type(const struct operator *op, size_t index)
{
    (void)op;
    return index == 1 ? UINT8 : FLOAT;
}

static int output_type(const struct operator *op, size_t index)
{
    (void)op, (void)index;
    return FLOAT;
}

static int input_kind(const struct operator *op, size_t index)
{
    (void)op;
    return index == 3 ? OPTIONAL : REQUIRED;
}

static int output_kind(const struct operator *op, size_t index)
{
    (void)op, (void)index;
    return REQUIRED;
}

static int input_memory(const struct operator *op, size_t index)
{
    (void)op, (void)index;
    return MEMORY_DEFAULT;
}

static int none(const struct operator *op)
{
    (void)op;
    return 0;
}

static int first_version(const struct operator *op)
{
    (void)op;
    return 1;
}

static int last_version(const struct operator *op)
{
    (void)op;
    return INT32_MAX;
}

static const struct operator W4A8_MATMUL = {
    .version = VERSION,
    .name = name,
    .provider = provider,
    .input_type = input_type,
    .input_count = input_count,
    .output_type = output_type,
    .output_count = output_count,
    .destroy = free,
    .input_kind = input_kind,
    .output_kind = output_kind,
    .input_memory = input_memory,
    .variadic = {none, none, none, none},
    .create_v2 = create,
    .compute_v2 = compute,
    .start_version = first_version,
    .end_version = last_version,
};

/* Found by its name when the library is registered with a session's options. */
__attribute__((visibility("default"))) status *RegisterCustomOps(void *options, const api_base *base);

status *RegisterCustomOps(void *options, const api_base *base)
{
    const function *api = base->get_api(VERSION);
    if (!api) /* ONNX Runtime says itself which version it has */
        return NULL;
    void *domain;
    TRY(CALL(api, CREATE_CUSTOM_OP_DOMAIN, const char *, void **)("cxr_triton", &domain));
    TRY(CALL(api, CUSTOM_OP_DOMAIN_ADD, void *, const struct operator *)(domain, &W4A8_MATMUL));
    return CALL(api, ADD_CUSTOM_OP_DOMAIN, void *, void *)(options, domain);
}
