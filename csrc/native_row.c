/*
 * The methods of evmp._native.Ring that deal with one row: its place, its
 * header, its payload. Views are of the ring's memory; they keep it alive, not
 * the row in it.
 */
#include "native_ring.h"

#include <stddef.h>
#include <string.h>

static bool to_row(PyObject *object, uint64_t *n)
{
    return native_to_u64(object, INT64_MAX, "row", n);
}

/* --- places -------------------------------------------------------------- */

PyDoc_STRVAR(is_open_doc,
"is_open(n, /)\n--\n\nReturn whether the place of row n is free for it.");

static PyObject *row_is_open(RingObject *self, PyObject *arg)
{
    uint64_t n;
    return to_row(arg, &n) ? PyBool_FromLong(ring_is_open(self->ring, n))
                           : NULL;
}

PyDoc_STRVAR(is_done_doc,
"is_done(n, /)\n--\n\nReturn whether row n is committed, or already released.");

static PyObject *row_is_done(RingObject *self, PyObject *arg)
{
    uint64_t n;
    return to_row(arg, &n) ? PyBool_FromLong(ring_is_done(self->ring, n))
                           : NULL;
}

PyDoc_STRVAR(wait_open_doc,
"wait_open(n, timeout, /)\n--\n\n"
"Wait up to `timeout` seconds for is_open(n).\n\n"
"Returns 0, TIMEOUT or STOPPED.");

static PyObject *row_wait_open(RingObject *self, PyObject *const *args,
                               Py_ssize_t n_args)
{
    uint64_t n;
    int64_t timeout;
    int answer;
    if (!native_has_args("wait_open", n_args, 2) || !to_row(args[0], &n) ||
        !native_to_timeout(args[1], &timeout)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    answer = ring_wait_open(self->ring, n, timeout);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(answer);
}

static PyObject *no_place(uint64_t n)
{
    return PyErr_Format(PyExc_RuntimeError, "row %llu has no place in the ring",
                        (unsigned long long)n);
}

PyDoc_STRVAR(commit_doc,
"commit(n, /)\n--\n\n"
"Publish row n, whose header and payload are written. Idempotent.\n\n"
"Raises RuntimeError when row n has no place in the ring now.");

static PyObject *row_commit(RingObject *self, PyObject *arg)
{
    uint64_t n;
    if (!to_row(arg, &n)) {
        return NULL;
    }
    return ring_commit(self->ring, n) ? Py_NewRef(Py_None) : no_place(n);
}

/* --- headers ------------------------------------------------------------- */

static PyObject *to_tuple(PyTypeObject *type, const ring_row *row)
{
    const uint64_t fields[ROW_FIELDS] = {row->row,    row->next,
                                         row->length, row->mark,
                                         row->kind,   row->height,
                                         row->width};
    PyObject *tuple = type->tp_alloc(type, ROW_FIELDS);
    for (Py_ssize_t i = 0; tuple != NULL && i < ROW_FIELDS; i++) {
        PyObject *field = PyLong_FromUnsignedLongLong(fields[i]);
        if (field == NULL) {
            Py_CLEAR(tuple);
        } else {
            PyTuple_SET_ITEM(tuple, i, field);
        }
    }
    return tuple;
}

static bool from_tuple(PyObject *tuple, ring_row *row)
{
    static const char *const names[ROW_FIELDS] = {
        "row", "next", "length", "mark", "kind", "height", "width"};
    uint64_t fields[ROW_FIELDS];
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != ROW_FIELDS) {
        PyErr_Format(PyExc_TypeError, "header is %R, expected a tuple of %d",
                     tuple, ROW_FIELDS);
        return false;
    }
    for (int i = 0; i < ROW_FIELDS; i++) {
        uint64_t limit = i < 3 ? UINT64_MAX : UINT32_MAX;
        if (!native_to_u64(PyTuple_GET_ITEM(tuple, i), limit, names[i],
                           &fields[i])) {
            return false;
        }
    }
    *row = (ring_row){.row = fields[0],
                      .next = fields[1],
                      .length = fields[2],
                      .mark = (uint32_t)fields[3],
                      .kind = (uint32_t)fields[4],
                      .height = (uint32_t)fields[5],
                      .width = (uint32_t)fields[6]};
    return true;
}

PyDoc_STRVAR(header_doc, "header(n, /)\n--\n\nReturn the header of row n.");

static PyObject *row_header(RingObject *self, PyObject *arg)
{
    uint64_t n;
    return to_row(arg, &n) ? to_tuple(self->header, ring_header(self->ring, n))
                           : NULL;
}

PyDoc_STRVAR(set_header_doc,
"set_header(n, header, /)\n--\n\nWrite the header of row n; its note stays.");

static PyObject *row_set_header(RingObject *self, PyObject *const *args,
                                Py_ssize_t n_args)
{
    uint64_t n;
    ring_row row;
    if (!native_has_args("set_header", n_args, 2) || !to_row(args[0], &n) ||
        !from_tuple(args[1], &row)) {
        return NULL;
    }
    memcpy(ring_header(self->ring, n), &row, offsetof(ring_row, note_length));
    Py_RETURN_NONE;
}

/* --- payloads ------------------------------------------------------------ */

static PyObject *view_of(RingObject *self, const unsigned char *start,
                         uint64_t length)
{
    const unsigned char *base = self->memory.buf;
    PyObject *first = PyLong_FromSsize_t(start - base);
    PyObject *last = PyLong_FromSsize_t(start - base + (Py_ssize_t)length);
    PyObject *slice = NULL, *view = NULL;
    if (first != NULL && last != NULL) {
        slice = PySlice_New(first, last, NULL);
    }
    if (slice != NULL) {
        view = PyObject_GetItem(self->view, slice);
    }
    Py_XDECREF(first);
    Py_XDECREF(last);
    Py_XDECREF(slice);
    return view;
}

PyDoc_STRVAR(payload_doc,
"payload(n, /)\n--\n\n"
"Return the payload of row n: row_bytes writable bytes, until its release.");

static PyObject *row_payload(RingObject *self, PyObject *arg)
{
    uint64_t n;
    return to_row(arg, &n) ? view_of(self, ring_payload(self->ring, n),
                                     self->ring->row_bytes)
                           : NULL;
}

PyDoc_STRVAR(note_doc,
"note(n, /)\n--\n\nReturn what set_note has left for row n.");

static PyObject *row_note(RingObject *self, PyObject *arg)
{
    uint64_t n;
    return to_row(arg, &n)
               ? view_of(self, ring_payload(self->ring, n),
                         self->ring->row_bytes - ring_room(self->ring, n))
               : NULL;
}

PyDoc_STRVAR(data_doc,
"data(n, /)\n--\n\n"
"Return the data of row n, without the note, until its release.");

static PyObject *row_data(RingObject *self, PyObject *arg)
{
    uint64_t n;
    if (!to_row(arg, &n)) {
        return NULL;
    }
    uint64_t room = ring_room(self->ring, n);
    uint64_t length = ring_header(self->ring, n)->length;
    return view_of(self,
                   ring_payload(self->ring, n) + self->ring->row_bytes - room,
                   length < room ? length : room);
}

PyDoc_STRVAR(room_doc,
"room(n, /)\n--\n\nReturn how many bytes of data row n has room for.");

static PyObject *row_room(RingObject *self, PyObject *arg)
{
    uint64_t n;
    return to_row(arg, &n)
               ? PyLong_FromUnsignedLongLong(ring_room(self->ring, n))
               : NULL;
}

PyDoc_STRVAR(used_doc,
"used(n, /)\n--\n\nReturn how many bytes the note and the data of row n take.");

static PyObject *row_used(RingObject *self, PyObject *arg)
{
    uint64_t n;
    if (!to_row(arg, &n)) {
        return NULL;
    }
    uint64_t room = ring_room(self->ring, n);
    uint64_t length = ring_header(self->ring, n)->length;
    return PyLong_FromUnsignedLongLong(self->ring->row_bytes - room +
                                       (length < room ? length : room));
}

PyDoc_STRVAR(set_note_doc,
"set_note(n, note, /)\n--\n\n"
"Leave `note` at the start of the payload of row n.\n\n"
"Raises ValueError when it is longer than row_bytes.");

static PyObject *row_set_note(RingObject *self, PyObject *const *args,
                              Py_ssize_t n_args)
{
    uint64_t n;
    Py_buffer note;
    PyObject *result = NULL;
    if (!native_has_args("set_note", n_args, 2) || !to_row(args[0], &n) ||
        PyObject_GetBuffer(args[1], &note, PyBUF_SIMPLE) < 0) {
        return NULL;
    }
    if ((uint64_t)note.len > self->ring->row_bytes) {
        PyErr_Format(PyExc_ValueError,
                     "note of %zd bytes does not fit the %llu of a row",
                     note.len, (unsigned long long)self->ring->row_bytes);
    } else {
        /* The note may be a view of this ring. */
        memmove(ring_payload(self->ring, n), note.buf, (size_t)note.len);
        ring_header(self->ring, n)->note_length = (uint64_t)note.len;
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&note);
    return result;
}

PyDoc_STRVAR(put_doc,
"put(n, header, data, /)\n--\n\n"
"Write and commit row n: its header, and `data` behind the note.\n\n"
"The header's length becomes that of the data. Raises RuntimeError when row\n"
"n has no place in the ring now, ValueError when the data have no room.");

static PyObject *row_put(RingObject *self, PyObject *const *args,
                         Py_ssize_t n_args)
{
    uint64_t n;
    ring_row row;
    Py_buffer data;
    PyObject *result = NULL;
    if (!native_has_args("put", n_args, 3) || !to_row(args[0], &n) ||
        !from_tuple(args[1], &row) ||
        PyObject_GetBuffer(args[2], &data, PyBUF_SIMPLE) < 0) {
        return NULL;
    }
    row.length = (uint64_t)data.len;
    if (row.length > ring_room(self->ring, n)) {
        PyErr_Format(PyExc_ValueError,
                     "data of %zd bytes do not fit the %llu behind the note",
                     data.len,
                     (unsigned long long)ring_room(self->ring, n));
    } else if (ring_put(self->ring, n, &row, data.buf)) {
        result = Py_NewRef(Py_None);
    } else {
        no_place(n);
    }
    PyBuffer_Release(&data);
    return result;
}

#define FAST(function) (PyCFunction)(void (*)(void))(function)

PyMethodDef native_row_methods[] = {
    {"is_open", (PyCFunction)row_is_open, METH_O, is_open_doc},
    {"is_done", (PyCFunction)row_is_done, METH_O, is_done_doc},
    {"wait_open", FAST(row_wait_open), METH_FASTCALL, wait_open_doc},
    {"commit", (PyCFunction)row_commit, METH_O, commit_doc},
    {"header", (PyCFunction)row_header, METH_O, header_doc},
    {"set_header", FAST(row_set_header), METH_FASTCALL, set_header_doc},
    {"payload", (PyCFunction)row_payload, METH_O, payload_doc},
    {"note", (PyCFunction)row_note, METH_O, note_doc},
    {"set_note", FAST(row_set_note), METH_FASTCALL, set_note_doc},
    {"data", (PyCFunction)row_data, METH_O, data_doc},
    {"room", (PyCFunction)row_room, METH_O, room_doc},
    {"used", (PyCFunction)row_used, METH_O, used_doc},
    {"put", FAST(row_put), METH_FASTCALL, put_doc},
    {NULL, NULL, 0, NULL},
};
