/*
 * evmp._native.Ring: ring.h for Python. It borrows the memory of a buffer,
 * keeps that buffer alive, and releases the GIL wherever it may wait.
 */
#include "native_ring.h"

/* --- arguments ----------------------------------------------------------- */

bool native_to_u64(PyObject *object, uint64_t limit, const char *name,
                   uint64_t *value)
{
    unsigned long long v = PyLong_AsUnsignedLongLong(object);
    if (v == (unsigned long long)-1 && PyErr_Occurred()) {
        return false;
    }
    if (v > limit) {
        PyErr_Format(PyExc_ValueError, "%s is %llu, expected at most %llu",
                     name, v, (unsigned long long)limit);
        return false;
    }
    *value = v;
    return true;
}

/* Seconds as nanoseconds; at most an hour, so that no sum overflows. */
bool native_to_timeout(PyObject *object, int64_t *ns)
{
    double seconds = PyFloat_AsDouble(object);
    if (seconds == -1.0 && PyErr_Occurred()) {
        return false;
    }
    if (!(seconds >= 0.0 && seconds <= 3600.0)) {
        PyErr_Format(PyExc_ValueError,
                     "timeout is %R, expected seconds from 0 to 3600", object);
        return false;
    }
    *ns = (int64_t)(seconds * 1e9);
    return true;
}

bool native_has_args(const char *name, Py_ssize_t found, Py_ssize_t expected)
{
    if (found == expected) {
        return true;
    }
    PyErr_Format(PyExc_TypeError, "Ring.%s takes %zd arguments, got %zd", name,
                 expected, found);
    return false;
}

/* --- construction -------------------------------------------------------- */

PyDoc_STRVAR(ring_doc,
"Ring(memory, header)\n--\n\n"
"A ring in `memory`, a writable buffer that Ring.format has laid out; the\n"
"headers of rows come as `header`, a type of named tuple.\n\n"
"Raises ValueError when the buffer holds no ring, TypeError when the type is\n"
"no tuple of Python's.");

/*
 * header() fills the tuples it allocates by itself, and types in C, such as
 * time.struct_time, have items that it does not know of. Those refuse to be
 * made by tuple.__new__, so that is tried once. Returns false with an
 * exception set.
 */
static bool is_plain_tuple(PyTypeObject *type)
{
    if (!PyType_IsSubtype(type, &PyTuple_Type)) {
        PyErr_Format(PyExc_TypeError, "%R is no type of tuple", type);
        return false;
    }
    if (type->tp_basicsize != PyTuple_Type.tp_basicsize ||
        type->tp_itemsize != PyTuple_Type.tp_itemsize) {
        PyErr_Format(PyExc_TypeError, "%R holds more than a tuple", type);
        return false;
    }
    PyObject *empty = PyObject_CallMethod((PyObject *)&PyTuple_Type, "__new__",
                                          "O", type);
    Py_XDECREF(empty);
    return empty != NULL;
}

/* The object's memory as bytes, whatever its items are. */
static PyObject *bytes_of(PyObject *object)
{
    PyObject *view = PyMemoryView_FromObject(object);
    if (view == NULL) {
        return NULL;
    }
    PyObject *bytes = PyObject_CallMethod(view, "cast", "s", "B");
    Py_DECREF(view);
    return bytes;
}

static PyObject *ring_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *object, *header;
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) != 0) {
        PyErr_SetString(PyExc_TypeError, "Ring takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OO!:Ring", &object, &PyType_Type, &header)) {
        return NULL;
    }
    if (!is_plain_tuple((PyTypeObject *)header)) {
        return NULL;
    }
    RingObject *self = (RingObject *)type->tp_alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    if (PyObject_GetBuffer(object, &self->memory, PyBUF_WRITABLE) < 0) {
        self->memory.obj = NULL;
        Py_DECREF(self);
        return NULL;
    }
    self->ring = self->memory.buf;
    if (!ring_is_valid(self->ring, (size_t)self->memory.len)) {
        PyErr_Format(PyExc_ValueError, "%zd bytes of memory hold no ring",
                     self->memory.len);
        Py_DECREF(self);
        return NULL;
    }
    self->header = (PyTypeObject *)Py_NewRef(header);
    self->view = bytes_of(object);
    if (self->view == NULL) {
        Py_CLEAR(self);
    }
    return (PyObject *)self;
}

static void ring_dealloc(RingObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(self->view);
    Py_XDECREF(self->header);
    if (self->memory.obj != NULL) {
        PyBuffer_Release(&self->memory);
    }
    type->tp_free(self);
    Py_DECREF(type);
}

static bool to_geometry(PyObject *const *args, uint64_t geometry[3])
{
    static const char *const names[] = {"n_slots", "n_rows", "row_bytes"};
    for (int i = 0; i < 3; i++) {
        if (!native_to_u64(args[i], INT64_MAX, names[i], &geometry[i])) {
            return false;
        }
    }
    return true;
}

PyDoc_STRVAR(measure_doc,
"measure(n_slots, n_rows, row_bytes, /)\n--\n\n"
"Return the bytes of memory that such a ring takes.\n\n"
"Raises ValueError when a number is 0 or the size overflows.");

static PyObject *ring_py_measure(PyObject *Py_UNUSED(type),
                                 PyObject *const *args, Py_ssize_t n_args)
{
    uint64_t g[3];
    if (!native_has_args("measure", n_args, 3) || !to_geometry(args, g)) {
        return NULL;
    }
    size_t size = ring_measure(g[0], g[1], g[2]);
    if (size == 0) {
        PyErr_Format(PyExc_ValueError,
                     "no ring of %llu slots of %llu rows of %llu bytes",
                     (unsigned long long)g[0], (unsigned long long)g[1],
                     (unsigned long long)g[2]);
        return NULL;
    }
    return PyLong_FromSize_t(size);
}

PyDoc_STRVAR(format_doc,
"format(memory, n_slots, n_rows, row_bytes, /)\n--\n\n"
"Lay out an empty ring in zeroed, page-aligned memory.\n\n"
"Raises ValueError when the memory is too small for it.");

static PyObject *ring_py_format(PyObject *Py_UNUSED(type),
                                PyObject *const *args, Py_ssize_t n_args)
{
    uint64_t g[3];
    Py_buffer memory;
    PyObject *result = NULL;
    if (!native_has_args("format", n_args, 4) || !to_geometry(args + 1, g) ||
        PyObject_GetBuffer(args[0], &memory, PyBUF_WRITABLE) < 0) {
        return NULL;
    }
    size_t size = ring_measure(g[0], g[1], g[2]);
    if (size == 0 || size > (size_t)memory.len ||
        (uintptr_t)memory.buf % RING_LINE != 0) {
        PyErr_Format(PyExc_ValueError,
                     "%zd bytes of memory do not fit a ring of %zu",
                     memory.len, size);
    } else {
        ring_format(memory.buf, g[0], g[1], g[2]);
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&memory);
    return result;
}

/* --- batches ------------------------------------------------------------- */

PyDoc_STRVAR(claim_doc,
"claim(seat, ordered, timeout, /)\n--\n\n"
"Take the oldest complete batch; with `ordered` only the oldest of all.\n\n"
"Waits up to `timeout` seconds. Returns its sequence number, or TIMEOUT,\n"
"DRAINED or STOPPED, which are negative.");

static PyObject *ring_py_claim(RingObject *self, PyObject *const *args,
                               Py_ssize_t n_args)
{
    uint64_t seat;
    int64_t timeout, answer;
    int ordered;
    if (!native_has_args("claim", n_args, 3) ||
        !native_to_u64(args[0], RING_MAX_SEAT, "seat", &seat) ||
        (ordered = PyObject_IsTrue(args[1])) < 0 ||
        !native_to_timeout(args[2], &timeout)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    answer = ring_claim(self->ring, (uint8_t)seat, ordered, timeout);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(answer);
}

static PyObject *not_held(uint64_t seq, uint64_t seat)
{
    PyErr_Format(PyExc_RuntimeError, "seat %llu does not hold batch %llu",
                 (unsigned long long)seat, (unsigned long long)seq);
    return NULL;
}

PyDoc_STRVAR(release_doc,
"release(seq, seat, /)\n--\n\n"
"Give the slot of batch `seq`, held by `seat`, to the next lap.\n\n"
"Raises RuntimeError when `seat` does not hold it.");

static PyObject *ring_py_release(RingObject *self, PyObject *const *args,
                                 Py_ssize_t n_args)
{
    uint64_t seq, seat;
    if (!native_has_args("release", n_args, 2) ||
        !native_to_u64(args[0], INT64_MAX, "batch", &seq) ||
        !native_to_u64(args[1], RING_MAX_SEAT, "seat", &seat)) {
        return NULL;
    }
    if (!ring_release(self->ring, seq, (uint8_t)seat)) {
        return not_held(seq, seat);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(reopen_doc,
"reopen(seq, seat, attempt, /)\n--\n\n"
"Hand batch `seq` of the dead `seat` to the next claimer.\n\n"
"For the supervisor, after waitpid. Raises RuntimeError as release().");

static PyObject *ring_py_reopen(RingObject *self, PyObject *const *args,
                                Py_ssize_t n_args)
{
    uint64_t seq, seat, attempt;
    if (!native_has_args("reopen", n_args, 3) ||
        !native_to_u64(args[0], INT64_MAX, "batch", &seq) ||
        !native_to_u64(args[1], RING_MAX_SEAT, "seat", &seat) ||
        !native_to_u64(args[2], RING_MAX_ATTEMPT, "attempt", &attempt)) {
        return NULL;
    }
    if (!ring_reopen(self->ring, seq, (uint8_t)seat, (uint8_t)attempt)) {
        return not_held(seq, seat);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(peek_doc,
"peek(seq, /)\n--\n\n"
"Return (seq, seat, attempt, is_claimed) of the slot batch `seq` lives in.");

static PyObject *ring_py_peek(RingObject *self, PyObject *arg)
{
    uint64_t seq;
    if (!native_to_u64(arg, INT64_MAX, "batch", &seq)) {
        return NULL;
    }
    ring_word w = ring_peek(self->ring, seq);
    return Py_BuildValue("(KiiO)", (unsigned long long)w.seq, w.seat,
                         w.attempt, w.phase == RING_RUN ? Py_True : Py_False);
}

/* --- the whole ring ------------------------------------------------------ */

PyDoc_STRVAR(close_doc,
"close(end, /)\n--\n\nSay that there are `end` rows, a multiple of n_rows.");

static PyObject *ring_py_close(RingObject *self, PyObject *arg)
{
    uint64_t end;
    if (!native_to_u64(arg, INT64_MAX, "end", &end)) {
        return NULL;
    }
    if (end % self->ring->n_rows != 0) {
        PyErr_Format(PyExc_ValueError, "end is %llu, no multiple of %llu rows",
                     (unsigned long long)end,
                     (unsigned long long)self->ring->n_rows);
        return NULL;
    }
    ring_close(self->ring, end);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(stop_doc,
"stop()\n--\n\nMake every waiting call return STOPPED, now and later.");

static PyObject *ring_py_stop(RingObject *self, PyObject *Py_UNUSED(none))
{
    ring_stop(self->ring);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(wake_doc, "wake()\n--\n\nWake every sleeper, after a recovery.");

static PyObject *ring_py_wake(RingObject *self, PyObject *Py_UNUSED(none))
{
    ring_wake(self->ring);
    Py_RETURN_NONE;
}

static PyMethodDef ring_methods[] = {
    {"measure", (PyCFunction)(void (*)(void))ring_py_measure,
     METH_FASTCALL | METH_STATIC, measure_doc},
    {"format", (PyCFunction)(void (*)(void))ring_py_format,
     METH_FASTCALL | METH_STATIC, format_doc},
    {"claim", (PyCFunction)(void (*)(void))ring_py_claim, METH_FASTCALL,
     claim_doc},
    {"release", (PyCFunction)(void (*)(void))ring_py_release, METH_FASTCALL,
     release_doc},
    {"reopen", (PyCFunction)(void (*)(void))ring_py_reopen, METH_FASTCALL,
     reopen_doc},
    {"peek", (PyCFunction)ring_py_peek, METH_O, peek_doc},
    {"close", (PyCFunction)ring_py_close, METH_O, close_doc},
    {"stop", (PyCFunction)ring_py_stop, METH_NOARGS, stop_doc},
    {"wake", (PyCFunction)ring_py_wake, METH_NOARGS, wake_doc},
    {NULL, NULL, 0, NULL},
};

static PyObject *get_field(RingObject *self, void *offset)
{
    const char *field = (const char *)self->ring + (size_t)offset;
    return PyLong_FromUnsignedLongLong(*(const uint64_t *)(const void *)field);
}

static PyObject *get_cursor(RingObject *self, void *Py_UNUSED(none))
{
    return PyLong_FromUnsignedLongLong(ring_cursor(self->ring));
}

static PyObject *get_backlog(RingObject *self, void *Py_UNUSED(none))
{
    return PyLong_FromUnsignedLongLong(ring_backlog(self->ring));
}

static PyObject *get_end(RingObject *self, void *Py_UNUSED(none))
{
    uint64_t end = atomic_load(&self->ring->end);
    return end == UINT64_MAX ? Py_NewRef(Py_None)
                             : PyLong_FromUnsignedLongLong(end);
}

#define FIELD(name, doc)                                                      \
    {#name, (getter)get_field, NULL, doc,                                     \
     (void *)offsetof(ring_control, name)}

static PyGetSetDef ring_getset[] = {
    FIELD(n_slots, "Batches that fit at once."),
    FIELD(n_rows, "Rows of a batch."),
    FIELD(row_bytes, "Bytes of payload a row has room for."),
    {"payload_start", (getter)get_field, NULL,
     "Offset of the payload, a multiple of 4096.",
     (void *)offsetof(ring_control, payload)},
    {"cursor", (getter)get_cursor, NULL, "The lowest unreleased batch.", NULL},
    {"backlog", (getter)get_backlog, NULL,
     "Complete or claimed batches, approximately.", NULL},
    {"end", (getter)get_end, NULL, "Rows in all, or None until closed.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot ring_slots[] = {
    {Py_tp_new, (void *)ring_new},
    {Py_tp_dealloc, (void *)ring_dealloc},
    {Py_tp_methods, ring_methods},
    {Py_tp_getset, ring_getset},
    {Py_tp_doc, (void *)ring_doc},
    {0, NULL},
};

static PyType_Spec ring_spec = {
    .name = "evmp._native.Ring",
    .basicsize = sizeof(RingObject),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = ring_slots,
};

/* Adds the methods that another file holds to the type. */
static int add_methods(PyTypeObject *type, PyMethodDef *methods)
{
    int failed = 0;
    for (PyMethodDef *m = methods; !failed && m->ml_name != NULL; m++) {
        PyObject *method = PyDescr_NewMethod(type, m);
        failed = method == NULL || PyObject_SetAttrString((PyObject *)type,
                                                          m->ml_name, method);
        Py_XDECREF(method);
    }
    return failed ? -1 : 0;
}

int native_add_ring(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &ring_spec, NULL);
    if (type == NULL) {
        return -1;
    }
    int failed = add_methods((PyTypeObject *)type, native_row_methods);
    failed = failed || PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return failed ||
                   PyModule_AddIntConstant(module, "TIMEOUT", RING_TIMEOUT) ||
                   PyModule_AddIntConstant(module, "DRAINED", RING_DRAINED) ||
                   PyModule_AddIntConstant(module, "STOPPED", RING_STOPPED)
               ? -1
               : 0;
}
