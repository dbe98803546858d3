/* evmp._native.base64_decode and Base64Error: base64.h for Python. */
#include "native.h"

#include "base64.h"

#define GIL_RELEASE_BYTES 16384 /* below, handing it over costs more */

/* The characters of a str or of a bytes-like object. */
struct text {
    const uint8_t *data;
    size_t n;
    Py_buffer buffer; /* obj is NULL for a str */
};

/* Raise Base64Error(message) with its position; steals the message. */
static void raise_at(PyObject *module, PyObject *message, Py_ssize_t position)
{
    PyObject *type = native_state(module)->base64_error;
    PyObject *error = NULL;
    PyObject *index = PyLong_FromSsize_t(position);
    if (message == NULL || index == NULL) {
        goto exit;
    }
    error = PyObject_CallOneArg(type, message);
    if (error != NULL &&
        PyObject_SetAttrString(error, "position", index) == 0) {
        PyErr_SetObject(type, error);
    }
exit:
    Py_XDECREF(message);
    Py_XDECREF(index);
    Py_XDECREF(error);
}

static void raise_non_ascii(PyObject *module, PyObject *object)
{
    Py_ssize_t at = 0;
    while (PyUnicode_READ_CHAR(object, at) < 128) {
        at++;
    }
    raise_at(module,
             PyUnicode_FromFormat("bad Base64 character 0x%x at position %zd",
                                  (int)PyUnicode_READ_CHAR(object, at), at),
             at);
}

static bool get_text(PyObject *module, PyObject *object, struct text *text)
{
    if (!PyUnicode_Check(object)) {
        if (PyObject_GetBuffer(object, &text->buffer, PyBUF_SIMPLE) < 0) {
            return false;
        }
        text->data = text->buffer.buf;
        text->n = (size_t)text->buffer.len;
        return true;
    }
#if PY_VERSION_HEX < 0x030C0000 /* later, every str is ready */
    if (PyUnicode_READY(object) < 0) {
        return false;
    }
#endif
    if (!PyUnicode_IS_ASCII(object)) {
        raise_non_ascii(module, object);
        return false;
    }
    text->data = PyUnicode_1BYTE_DATA(object);
    text->n = (size_t)PyUnicode_GET_LENGTH(object);
    return true;
}

static void raise_fault(PyObject *module, enum base64_fault fault,
                        const struct text *text, size_t n_dst, size_t position)
{
    Py_ssize_t at = (Py_ssize_t)position;
    PyObject *message = NULL;
    switch (fault) {
    case BASE64_BAD_CHARACTER:
        message = PyUnicode_FromFormat(
            "bad Base64 character 0x%02x at position %zd", text->data[at], at);
        break;
    case BASE64_BAD_PADDING:
        message = PyUnicode_FromFormat(
            "bad Base64 padding: 0x%02x at position %zd", text->data[at], at);
        break;
    case BASE64_TRUNCATED:
        message = PyUnicode_FromFormat(
            "truncated Base64: ends at position %zd, inside a group of 4", at);
        break;
    case BASE64_TRAILING_BITS:
        message = PyUnicode_FromFormat(
            "bad Base64: bits behind the last byte are not zero at position "
            "%zd", at);
        break;
    case BASE64_NO_SPACE:
        PyErr_Format(PyExc_ValueError,
                     "destination of %zu bytes is too small for Base64 text "
                     "of %zu characters", n_dst, text->n);
        return;
    }
    raise_at(module, message, at);
}

static ptrdiff_t decode(enum simd_level level, struct base64_options options,
                        const struct text *text, const Py_buffer *dst,
                        size_t *position)
{
    ptrdiff_t n;
    if (text->n < GIL_RELEASE_BYTES) {
        return base64_decode(level, options, text->data, text->n, dst->buf,
                             (size_t)dst->len, position);
    }
    Py_BEGIN_ALLOW_THREADS
    n = base64_decode(level, options, text->data, text->n, dst->buf,
                      (size_t)dst->len, position);
    Py_END_ALLOW_THREADS
    return n;
}

static PyObject *native_base64_decode(PyObject *module, PyObject *args,
                                      PyObject *kwargs)
{
    static char *names[] = {"src", "dst", "url", "whitespace", NULL};
    PyObject *src;
    PyObject *result = NULL;
    struct text text = {0};
    Py_buffer dst = {0};
    int url = 0;
    int whitespace = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Ow*|$pp:base64_decode",
                                     names, &src, &dst, &url, &whitespace)) {
        return NULL;
    }
    if (!get_text(module, src, &text)) {
        goto exit;
    }
    struct base64_options options = {url != 0, whitespace != 0};
    size_t position = 0;
    ptrdiff_t n = decode(native_state(module)->level, options, &text, &dst,
                         &position);
    if (n < 0) {
        raise_fault(module, (enum base64_fault)n, &text, (size_t)dst.len,
                    position);
        goto exit;
    }
    result = PyLong_FromSsize_t(n);
exit:
    PyBuffer_Release(&text.buffer);
    PyBuffer_Release(&dst);
    return result;
}

PyDoc_STRVAR(base64_decode_doc,
"base64_decode($module, src, dst, *, url=False, whitespace=False)\n--\n\n"
"Decode strict Base64 text into a writable buffer; return the bytes written.");

PyDoc_STRVAR(base64_error_doc,
"Text that is not strict Base64; position is the index of the fault in it.");

static PyMethodDef functions[] = {
    {"base64_decode", (PyCFunction)(void (*)(void))native_base64_decode,
     METH_VARARGS | METH_KEYWORDS, base64_decode_doc},
    {NULL, NULL, 0, NULL},
};

int native_add_base64(PyObject *module)
{
    PyObject *error = PyErr_NewExceptionWithDoc(
        "evmp._native.Base64Error", base64_error_doc, PyExc_ValueError, NULL);
    native_state(module)->base64_error = error;
    return error == NULL || PyModule_AddObjectRef(module, "Base64Error",
                                                  error) < 0
               ? -1
               : PyModule_AddFunctions(module, functions);
}
