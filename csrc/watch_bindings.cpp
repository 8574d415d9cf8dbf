// Whether objects of Python are still what they were, for the module fewbits.kernels._native. Between two tokens a model's weights drive its
// objects out of the caches. Looked at one by one each waits for memory several times, so that all that was touched at first is asked for together.
#include "watch_bindings.h"

#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "reader.h"

namespace nb = nanobind;

namespace fewbits {
namespace {

// Entries of dictionaries, types of objects and addresses of tensors, and other dictionaries that are empty as long as nothing is unusual.
class Watch {
 public:
  Watch(nb::list owners, nb::list names, nb::list modules, nb::list tensors, nb::list empties, const std::vector<uint64_t>& memory, nb::object address_of)
      : owners_(std::move(owners)), names_(std::move(names)), modules_(std::move(modules)), tensors_(std::move(tensors)), empties_(std::move(empties)), address_of_(std::move(address_of)) {
    require(owners_.size() == names_.size(), "each owner has a name");
    for (nb::handle owner : owners_) require(PyDict_Check(owner.ptr()), "owners must be dictionaries");
    for (nb::handle empty : empties_) require(PyDict_Check(empty.ptr()), "what is to be empty must be dictionaries");
    for (size_t i = 0; i < owners_.size(); ++i) held_.push_back(nb::borrow(entry(i)));
    for (nb::handle module : modules_) kinds_.push_back(nb::borrow(module.type()));
    for (nb::handle tensor : tensors_) addresses_.push_back(address(tensor));
    remember(memory);
  }

  // Whether every entry, type and address is the one that it was.
  bool same() const {
    for (const uint64_t line : lines_) __builtin_prefetch(reinterpret_cast<const void*>(line));
    for (size_t i = 0; i < held_.size(); ++i) if (entry(i) != held_[i].ptr()) return false;
    for (size_t i = 0; i < kinds_.size(); ++i) if (modules_[i].type().ptr() != kinds_[i].ptr()) return false;
    for (size_t i = 0; i < addresses_.size(); ++i) if (address(tensors_[i]) != addresses_[i]) return false;
    return true;
  }

  bool empty() const {
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

  // The lines of memory that looking touches now. Later ones may be others: what is asked for in vain costs nothing.
  void remember(const std::vector<uint64_t>& memory) {
    const auto touch = [this](const void* data, int bytes) {
      const uint64_t first = reinterpret_cast<uint64_t>(data) / 64, last = (reinterpret_cast<uint64_t>(data) + static_cast<uint64_t>(bytes) - 1) / 64;
      for (uint64_t line = first; data != nullptr && line <= last; ++line) lines_.push_back(line * 64);
    };
    for (const nb::list* list : {&modules_, &names_, &tensors_, &empties_}) for (nb::handle one : *list) touch(one.ptr(), 40);
    for (nb::handle owner : owners_) {
      const PyDictObject* dict = reinterpret_cast<const PyDictObject*>(owner.ptr());
      touch(dict, sizeof *dict);
      touch(dict->ma_keys, static_cast<int>(std::min<Py_ssize_t>(96 + 40 * dict->ma_used, 1536)));  // a head, places and entries
      touch(dict->ma_values, static_cast<int>(std::min<Py_ssize_t>(8 * dict->ma_used + 8, 512)));
    }
    for (const uint64_t address : memory) touch(reinterpret_cast<const void*>(address), 192);
    std::sort(lines_.begin(), lines_.end());
    lines_.erase(std::unique(lines_.begin(), lines_.end()), lines_.end());
  }

  const nb::list owners_, names_, modules_, tensors_, empties_;
  const nb::object address_of_;
  std::vector<nb::object> held_, kinds_;
  std::vector<uint64_t> addresses_, lines_;
};

}  // namespace

void bind_watch(nb::module_& module) {
  nb::class_<Watch>(module, "Watch", "Entries of dictionaries, types of objects and addresses of tensors as they were; `memory` is what else looking at them touches.")
      .def(nb::init<nb::list, nb::list, nb::list, nb::list, nb::list, std::vector<uint64_t>, nb::object>(), nb::arg("owners"), nb::arg("names"), nb::arg("modules"), nb::arg("tensors"), nb::arg("empties"),
           nb::arg("memory"), nb::arg("address_of"))
      .def("same", &Watch::same, "Whether all are what they were.")
      .def("empty", &Watch::empty, "Whether the other dictionaries are empty.");
}

}  // namespace fewbits
