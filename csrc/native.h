/*
 * What the binding files share. native.c makes the module; each other
 * native_*.c adds its functions or types to it and keeps to one subject.
 */
#ifndef EVMP_NATIVE_H
#define EVMP_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "resize.h"
#include "simd.h"

struct native_state {
    enum simd_level level;
    PyObject *base64_error;
    struct resize_workspace *idle; /* taken by a resize() that runs */
};

/* The state of the module, which its functions get as first argument. */
static inline struct native_state *native_state(PyObject *module)
{
    return (struct native_state *)PyModule_GetState(module);
}

/* Each returns 0, or -1 with an exception set. */
int native_add_base64(PyObject *module);
int native_add_image(PyObject *module);
int native_add_process(PyObject *module);
int native_add_ring(PyObject *module);

#endif
