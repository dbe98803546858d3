/*
 * evmp._native: the C kernels for Python. This file holds the module, its
 * state and the choice of instruction set; it knows no kernel.
 */
#include "native.h"

#include <string.h>

static PyObject *simd_levels(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    (void)module;
    PyObject *names = PyList_New(0);
    PyObject *result = NULL;
    for (int i = 0; names != NULL && i < SIMD_N_LEVELS; i++) {
        enum simd_level level = (enum simd_level)i;
        if (!simd_is_supported(level)) {
            continue;
        }
        PyObject *name = PyUnicode_FromString(simd_name(level));
        if (name == NULL || PyList_Append(names, name) < 0) {
            Py_XDECREF(name);
            goto exit;
        }
        Py_DECREF(name);
    }
    if (names != NULL) {
        result = PyList_AsTuple(names);
    }
exit:
    Py_XDECREF(names);
    return result;
}

static PyObject *simd_level(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    return PyUnicode_FromString(simd_name(native_state(module)->level));
}

static PyObject *set_simd_level(PyObject *module, PyObject *name)
{
    const char *wanted = PyUnicode_AsUTF8(name);
    if (wanted == NULL) {
        return NULL;
    }
    for (int i = 0; i < SIMD_N_LEVELS; i++) {
        enum simd_level level = (enum simd_level)i;
        if (simd_is_supported(level) && strcmp(wanted, simd_name(level)) == 0) {
            native_state(module)->level = level;
            Py_RETURN_NONE;
        }
    }
    return PyErr_Format(PyExc_ValueError,
                        "simd level %R is not one of simd_levels()", name);
}

static PyMethodDef methods[] = {
    {"simd_levels", simd_levels, METH_NOARGS,
     "The levels that this CPU has, from slow to fast."},
    {"simd_level", simd_level, METH_NOARGS, "The level in use."},
    {"set_simd_level", set_simd_level, METH_O,
     "Force a level, for tests and benchmarks."},
    {NULL, NULL, 0, NULL},
};

static int native_exec(PyObject *module)
{
    native_state(module)->level = simd_best();
    if (native_add_base64(module) < 0 || native_add_image(module) < 0 ||
        native_add_process(module) < 0 || native_add_ring(module) < 0) {
        return -1;
    }
    return 0;
}

static int native_traverse(PyObject *module, visitproc visit, void *arg)
{
    Py_VISIT(native_state(module)->base64_error);
    return 0;
}

static int native_clear(PyObject *module)
{
    Py_CLEAR(native_state(module)->base64_error);
    return 0;
}

static void native_free(void *module)
{
    struct native_state *state = native_state(module);
    native_clear(module);
    resize_workspace_free(state->idle);
    state->idle = NULL;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)native_exec},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "evmp._native",
    .m_doc = "Kernels in C: Base64, resizing, normalisation, the ring.",
    .m_size = sizeof(struct native_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = native_traverse,
    .m_clear = native_clear,
    .m_free = native_free,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
