// Memory of one thread that grows as needed and is kept for the next call.
#pragma once
#include <stdlib.h>

namespace glm4 {

class Scratch {
  public:
    ~Scratch() { free(memory_); }
    char *need(size_t bytes) {
        if (bytes > size_) {
            free(memory_);
            size_ = (bytes + 4095) / 4096 * 4096;
            memory_ = static_cast<char *>(aligned_alloc(4096, size_));
            if (!memory_) abort();  // as operator new would end a library without exceptions
        }
        return memory_;
    }

  private:
    char *memory_ = nullptr;
    size_t size_ = 0;
};

}  // namespace glm4
