/* What native_ring.c and native_row.c share: the object, and its arguments. */
#ifndef EVMP_NATIVE_RING_H
#define EVMP_NATIVE_RING_H

#include "native.h"
#include "ring.h"

typedef struct {
    PyObject_HEAD
    Py_buffer memory;
    ring_control *ring;
    PyObject *view;   /* of the memory */
    PyTypeObject *header; /* what header() returns: a tuple of ROW_FIELDS */
} RingObject;

#define ROW_FIELDS 7

/* Each returns false with an exception set. */
bool native_to_u64(PyObject *object, uint64_t limit, const char *name,
                   uint64_t *value);
bool native_to_timeout(PyObject *object, int64_t *ns);
bool native_has_args(const char *name, Py_ssize_t found, Py_ssize_t expected);

/* The methods of Ring that deal with one row. */
extern PyMethodDef native_row_methods[];

#endif
