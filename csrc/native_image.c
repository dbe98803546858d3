/* evmp._native.resize and normalize: resize.h and normalize.h for Python. */
#include "native.h"

#include <string.h>

#include "normalize.h"


/* --- arguments ----------------------------------------------------------- */

#define MAX_SIDE ((Py_ssize_t)RESIZE_MAX_SIDE)

/* The bytes of a (height, width, 3) image, or 0 with an exception set. */
static Py_ssize_t bytes_of_image(Py_ssize_t height, Py_ssize_t width)
{
    Py_ssize_t bytes = 0;
    if (height < 1 || width < 1 || height > MAX_SIDE || width > MAX_SIDE) {
        PyErr_Format(PyExc_ValueError,
                     "image of %zd x %zd pixels (height x width), expected "
                     "sides from 1 to %zd", height, width, MAX_SIDE);
    } else if (__builtin_mul_overflow(height, width * 3, &bytes)) {
        PyErr_Format(PyExc_OverflowError,
                     "image of %zd x %zd pixels is too large", height, width);
        bytes = 0;
    }
    return bytes;
}

static bool is_image(const char *name, const Py_buffer *buffer,
                     Py_ssize_t height, Py_ssize_t width)
{
    Py_ssize_t expected = bytes_of_image(height, width);
    if (expected != 0 && buffer->len != expected) {
        PyErr_Format(PyExc_ValueError,
                     "%s has %zd bytes, expected %zd x %zd x 3 = %zd", name,
                     buffer->len, height, width, expected);
    }
    return expected != 0 && buffer->len == expected;
}

/* PyArg_ParseTuple for something that need not be a tuple. */
static bool parse_tuple(PyObject *object, const char *format, ...)
{
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, strchr(format, ';') + 1);
        return false;
    }
    va_list values;
    va_start(values, format);
    int is_parsed = PyArg_VaParse(object, format, values);
    va_end(values);
    return is_parsed != 0;
}

static bool to_box(PyObject *object, struct resize_request *r)
{
    r->right = (double)r->src_width;
    r->bottom = (double)r->src_height;
    if (object == Py_None) {
        return true;
    }
    if (!parse_tuple(object, "dddd;box must be (left, top, right, bottom)",
                     &r->left, &r->top, &r->right, &r->bottom)) {
        return false;
    }
    if (!(0.0 <= r->left && r->left < r->right &&
          r->right <= (double)r->src_width && 0.0 <= r->top &&
          r->top < r->bottom && r->bottom <= (double)r->src_height)) {
        PyErr_Format(PyExc_ValueError,
                     "box %R is empty or not inside the %zu x %zu source "
                     "(width x height)", object, r->src_width, r->src_height);
        return false;
    }
    return true;
}

static bool to_into(PyObject *object, struct resize_request *r)
{
    r->into_width = r->dst_width;
    r->into_height = r->dst_height;
    if (object == Py_None) {
        return true;
    }
    Py_ssize_t left, top, width, height;
    if (!parse_tuple(object, "nnnn;into must be (left, top, width, height)",
                     &left, &top, &width, &height)) {
        return false;
    }
    Py_ssize_t dst_width = (Py_ssize_t)r->dst_width;
    Py_ssize_t dst_height = (Py_ssize_t)r->dst_height;
    if (left < 0 || top < 0 || width < 1 || height < 1 ||
        width > dst_width || left > dst_width - width ||
        height > dst_height || top > dst_height - height) {
        PyErr_Format(PyExc_ValueError,
                     "into %R is empty or not inside the %zu x %zu "
                     "destination (width x height)",
                     object, r->dst_width, r->dst_height);
        return false;
    }
    r->into_left = (size_t)left;
    r->into_top = (size_t)top;
    r->into_width = (size_t)width;
    r->into_height = (size_t)height;
    return true;
}

static bool to_fill(PyObject *object, struct resize_request *r)
{
    if (object == NULL) {
        return true;
    }
    int fill[3];
    if (!parse_tuple(object, "iii;fill must be (red, green, blue)", &fill[0],
                     &fill[1], &fill[2])) {
        return false;
    }
    for (size_t c = 0; c < 3; c++) {
        if (fill[c] < 0 || fill[c] > 255) {
            PyErr_Format(PyExc_ValueError,
                         "fill %R is outside 0 to 255", object);
            return false;
        }
        r->fill[c] = (uint8_t)fill[c];
    }
    return true;
}

static bool to_filter(const char *name, struct resize_request *r)
{
    if (strcmp(name, "bilinear") == 0) {
        r->filter = RESIZE_BILINEAR;
    } else if (strcmp(name, "bicubic") == 0) {
        r->filter = RESIZE_BICUBIC;
    } else {
        PyErr_Format(PyExc_ValueError,
                     "filter is '%s', expected 'bilinear' or 'bicubic'", name);
        return false;
    }
    return true;
}

static bool to_map(PyObject *scale, PyObject *bias, struct normalize_map *map)
{
    return parse_tuple(scale, "fff;scale must be a tuple of three numbers",
                       &map->scale[0], &map->scale[1], &map->scale[2]) &&
           parse_tuple(bias, "fff;bias must be a tuple of three numbers",
                       &map->bias[0], &map->bias[1], &map->bias[2]);
}

/* --- resize -------------------------------------------------------------- */

/*
 * What a workspace may keep. An image takes up to 100 bytes for each pixel of
 * its width and 40 for each of its height, so no JPEG takes more: their sides
 * end at 65,535. One of 16,000,000 pixels in a row takes a gigabyte.
 */
#define KEPT_BYTES ((size_t)16 << 20)

/*
 * One workspace is kept, if it is no giant; a second thread meanwhile pays for
 * its own.
 */
static bool run_resize(struct native_state *state,
                       const struct resize_request *request)
{
    struct resize_workspace *workspace = state->idle;
    state->idle = NULL;
    bool is_done = false;
    Py_BEGIN_ALLOW_THREADS
    if (workspace == NULL) {
        workspace = resize_workspace_new();
    }
    is_done = workspace != NULL && resize(state->level, workspace, request);
    if (workspace != NULL && resize_workspace_bytes(workspace) > KEPT_BYTES) {
        resize_workspace_free(workspace);
        workspace = NULL;
    }
    Py_END_ALLOW_THREADS
    if (state->idle == NULL) {
        state->idle = workspace;
    } else {
        resize_workspace_free(workspace);
    }
    return is_done;
}

static PyObject *native_resize(PyObject *module, PyObject *args,
                               PyObject *kwargs)
{
    static char *names[] = {"src", "src_height", "src_width",
                            "dst", "dst_height", "dst_width",
                            "box", "into", "fill", "filter", "swap", NULL};
    PyObject *result = NULL;
    PyObject *box = Py_None;
    PyObject *into = Py_None;
    PyObject *fill = NULL;
    const char *filter = "bilinear";
    int swap = 0;
    Py_buffer src = {0};
    Py_buffer dst = {0};
    struct resize_request request = {0};
    Py_ssize_t src_height, src_width, dst_height, dst_width;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "y*nnw*nn|$OOOsp:resize", names, &src, &src_height,
            &src_width, &dst, &dst_height, &dst_width, &box, &into,
            &fill, &filter, &swap)) {
        return NULL;
    }
    if (!is_image("src", &src, src_height, src_width) ||
        !is_image("dst", &dst, dst_height, dst_width)) {
        goto exit;
    }
    request.src = src.buf;
    request.src_height = (size_t)src_height;
    request.src_width = (size_t)src_width;
    request.dst = dst.buf;
    request.dst_height = (size_t)dst_height;
    request.dst_width = (size_t)dst_width;
    request.swap = swap != 0;
    if (!to_box(box, &request) || !to_into(into, &request) ||
        !to_fill(fill, &request) || !to_filter(filter, &request)) {
        goto exit;
    }
    if (!run_resize(native_state(module), &request)) {
        PyErr_NoMemory();
        goto exit;
    }
    result = Py_NewRef(Py_None);
exit:
    PyBuffer_Release(&src);
    PyBuffer_Release(&dst);
    return result;
}

/* --- normalize ----------------------------------------------------------- */

static bool are_batches(const Py_buffer *src, const Py_buffer *dst,
                        Py_ssize_t height, Py_ssize_t width)
{
    Py_ssize_t image = bytes_of_image(height, width);
    if (image == 0) {
        return false;
    }
    if (src->len % image != 0) {
        PyErr_Format(PyExc_ValueError,
                     "src has %zd bytes, expected a multiple of %zd x %zd x 3",
                     src->len, height, width);
    } else if (dst->len % (Py_ssize_t)sizeof(float) != 0 ||
               dst->len / (Py_ssize_t)sizeof(float) != src->len) {
        PyErr_Format(PyExc_ValueError,
                     "dst has %zd bytes, expected 4 for each of the %zd of "
                     "src", dst->len, src->len);
    } else if ((uintptr_t)dst->buf % sizeof(float) != 0) {
        PyErr_SetString(PyExc_ValueError, "dst is not aligned to 4 bytes");
    }
    return !PyErr_Occurred();
}

static PyObject *native_normalize(PyObject *module, PyObject *args,
                                  PyObject *kwargs)
{
    static char *names[] = {"src", "dst", "height", "width",
                            "scale", "bias", NULL};
    PyObject *result = NULL;
    PyObject *scale;
    PyObject *bias;
    Py_buffer src = {0};
    Py_buffer dst = {0};
    struct normalize_map map;
    Py_ssize_t height, width;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y*w*nn$OO:normalize", names,
                                     &src, &dst, &height, &width, &scale,
                                     &bias)) {
        return NULL;
    }
    if (!are_batches(&src, &dst, height, width) ||
        !to_map(scale, bias, &map)) {
        goto exit;
    }
    size_t pixels = (size_t)height * (size_t)width;
    size_t n = (size_t)src.len / (pixels * 3);
    enum simd_level level = native_state(module)->level;
    Py_BEGIN_ALLOW_THREADS
    normalize(level, &map, src.buf, n, pixels, dst.buf);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
exit:
    PyBuffer_Release(&src);
    PyBuffer_Release(&dst);
    return result;
}

PyDoc_STRVAR(resize_doc,
"resize($module, src, src_height, src_width, dst, dst_height, dst_width, *,\n"
"       box=None, into=None, fill=(0, 0, 0), filter='bilinear', swap=False)\n"
"--\n\n"
"Resize a box of an (H, W, 3) uint8 image into a rectangle of another.");

PyDoc_STRVAR(normalize_doc,
"normalize($module, src, dst, height, width, *, scale, bias)\n--\n\n"
"Write (N, H, W, 3) uint8 as (N, 3, H, W) float32, times scale plus bias.");

static PyMethodDef functions[] = {
    {"resize", (PyCFunction)(void (*)(void))native_resize,
     METH_VARARGS | METH_KEYWORDS, resize_doc},
    {"normalize", (PyCFunction)(void (*)(void))native_normalize,
     METH_VARARGS | METH_KEYWORDS, normalize_doc},
    {NULL, NULL, 0, NULL},
};

int native_add_image(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
