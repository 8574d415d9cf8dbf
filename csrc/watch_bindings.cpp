// Whether objects of Python are still what they were, for the module fewbits.kernels._native. Between two tokens a model's weights drive its
// objects out of the caches. Looked at one by one each waits for memory, so that their memory is asked for together before.
#include "watch_bindings.h"

#include <cstdint>
#include <vector>

#include "reader.h"

namespace nb = nanobind;

namespace fewbits {
namespace {

void fetch(const void* data, int lines) {
  for (int line = 0; line < lines; ++line) __builtin_prefetch(static_cast<const char*>(data) + 64 * line);
}

// Entries of dictionaries, types of objects and addresses of tensors, and other dictionaries that are empty as long as nothing is unusual.
class Watch {
 public:
  Watch(nb::list owners, nb::list names, nb::list modules, nb::list tensors, nb::list empties, nb::object address_of)
      : owners_(std::move(owners)), names_(std::move(names)), modules_(std::move(modules)), tensors_(std::move(tensors)), empties_(std::move(empties)), address_of_(std::move(address_of)) {
    require(owners_.size() == names_.size(), "each owner has a name");
    for (nb::handle owner : owners_) require(PyDict_Check(owner.ptr()), "owners must be dictionaries");
    for (nb::handle empty : empties_) require(PyDict_Check(empty.ptr()), "what is to be empty must be dictionaries");
    for (size_t i = 0; i < owners_.size(); ++i) held_.push_back(nb::borrow(entry(i)));
    for (nb::handle module : modules_) kinds_.push_back(nb::borrow(module.type()));
    for (nb::handle tensor : tensors_) addresses_.push_back(address(tensor));
  }

  // Whether every entry, type and address is the one that it was.
  bool same() const {
    fetch_all();
    for (size_t i = 0; i < held_.size(); ++i) if (entry(i) != held_[i].ptr()) return false;
    for (size_t i = 0; i < kinds_.size(); ++i) if (modules_[i].type().ptr() != kinds_[i].ptr()) return false;
    for (size_t i = 0; i < addresses_.size(); ++i) if (address(tensors_[i]) != addresses_[i]) return false;
    return true;
  }

  bool empty() const {
    for (nb::handle one : empties_) fetch(one.ptr(), 1);
    for (nb::handle one : empties_) if (PyDict_GET_SIZE(one.ptr()) != 0) return false;
    return true;
  }

 private:
  // None where there is none.
  PyObject* entry(size_t i) const {
    PyObject* found = PyDict_GetItemWithError(PyList_GET_ITEM(owners_.ptr(), static_cast<Py_ssize_t>(i)), PyList_GET_ITEM(names_.ptr(), static_cast<Py_ssize_t>(i)));
    if (found == nullptr && PyErr_Occurred() != nullptr) throw nb::python_error();
    return found == nullptr ? Py_None : found;
  }

  uint64_t address(nb::handle tensor) const { return nb::cast<uint64_t>(address_of_(tensor)); }

  void fetch_all() const {
    for (const nb::list* list : {&owners_, &modules_, &tensors_}) for (nb::handle one : *list) fetch(one.ptr(), 1);
    for (nb::handle owner : owners_) {
      const PyDictObject* dict = reinterpret_cast<const PyDictObject*>(owner.ptr());
      fetch(dict->ma_keys, 4);
      if (dict->ma_values != nullptr) fetch(dict->ma_values, 3);
    }
    for (nb::handle tensor : tensors_) {  // what it is a handle of: some of the words behind its head are addresses
      const void* const* words = reinterpret_cast<const void* const*>(tensor.ptr() + 1);
      for (int i = 0; i < 2; ++i) fetch(words[i], 3);
    }
  }

  const nb::list owners_, names_, modules_, tensors_, empties_;
  const nb::object address_of_;
  std::vector<nb::object> held_, kinds_;
  std::vector<uint64_t> addresses_;
};

}  // namespace

void bind_watch(nb::module_& module) {
  nb::class_<Watch>(module, "Watch", "Entries of dictionaries, types of objects and addresses of tensors as they were when it was made.")
      .def(nb::init<nb::list, nb::list, nb::list, nb::list, nb::list, nb::object>(), nb::arg("owners"), nb::arg("names"), nb::arg("modules"), nb::arg("tensors"), nb::arg("empties"),
           nb::arg("address_of"))
      .def("same", &Watch::same, "Whether all are what they were.")
      .def("empty", &Watch::empty, "Whether the other dictionaries are empty.");
}

}  // namespace fewbits
