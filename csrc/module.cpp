// The Python module gkd_fast._C. Importing it registers the CPU kernels; its functions are for tests and fakes.
#include <Python.h>

#include "cpu/host.h"

namespace {

PyObject* set_block(PyObject*, PyObject* argument) {
  const long long rows = PyLong_AsLongLong(argument);
  if (rows == -1 && PyErr_Occurred()) return nullptr;
  if (rows < 0 || rows % 32 != 0) {
    PyErr_SetString(PyExc_ValueError, "rows per tile must be a multiple of 32, or 0 for the default");
    return nullptr;
  }
  gkd::set_block(rows);
  Py_RETURN_NONE;
}

PyObject* set_keeping(PyObject*, PyObject* argument) {
  gkd::set_keeping(PyObject_IsTrue(argument));
  Py_RETURN_NONE;
}

PyObject* kept_elements(PyObject*, PyObject* arguments) {
  long long rows, graphs, width;
  int is_double;
  if (!PyArg_ParseTuple(arguments, "LLLp", &rows, &graphs, &width, &is_double)) return nullptr;
  return PyLong_FromLongLong(gkd::kept_elements(is_double ? at::kDouble : at::kFloat, rows, graphs, width));
}

PyObject* set_instruction_set(PyObject*, PyObject* argument) {
  const char* name = PyUnicode_AsUTF8(argument);
  if (!name) return nullptr;
  if (!gkd::set_instruction_set(name)) {
    PyErr_Format(PyExc_ValueError, "this processor has no instruction set %s", name);
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* instruction_sets(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const std::string& name : gkd::instruction_sets()) {
    PyObject* item = PyUnicode_FromString(name.c_str());
    PyList_Append(names, item);
    Py_DECREF(item);
  }
  return names;
}

PyMethodDef methods[] = {
    {"_set_block", set_block, METH_O, "Rows per tile, a multiple of 32; 0 lets the kernels choose."},
    {"_set_instruction_set", set_instruction_set, METH_O, "Use the kernels of this instruction set."},
    {"_set_keeping", set_keeping, METH_O, "Whether forward passes keep the affinities of small graphs."},
    {"_kept_elements", kept_elements, METH_VARARGS,
     "(rows, graphs, width, is_double): elements of the affinities that a forward pass keeps, 0 where it keeps none."},
    {"_instruction_sets", instruction_sets, METH_NOARGS, "The instruction sets of this processor, best first."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "The CPU kernels of gkd_fast.", -1, methods,
                          nullptr,               nullptr, nullptr,                    nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
