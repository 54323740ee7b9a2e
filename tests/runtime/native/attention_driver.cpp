// Runs attention on every instruction set, on random texts, and compares it with a plain loop in double.
//
// attention_driver CASES [ISA...]: for each named instruction set prints "ISA cases worst": how many cases were
// computed, and the largest difference in units of what is allowed. Each is computed on one thread and on two, which
// must agree to the last bit, with the caches copied and in place. Texts that do not fit and positions that do not
// exist must be refused. Exits with 1 if anything is wrong, and says which case it was. Every array gets an allocation
// of its own exact size, so that the address sanitizer sees a read past its end.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"
#include "kernels.h"
#include "threads.h"

namespace {

constexpr double kAllowed = 4e-6;  // of the largest magnitude

struct Case {
  fips::Attention shape{};
  std::vector<float> qkv, past_key, past_value, cosines, sines, q_norm, k_norm;
  std::vector<int32_t> seqlens_k;
  std::vector<int64_t> position_ids;

  size_t group() const { return shape.heads / shape.kv_heads; }
  size_t past(size_t text) const { return static_cast<size_t>(seqlens_k[text]) + 1 - shape.tokens; }
};

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  size_t upto(size_t largest) { return engine_() % (largest + 1); }
  size_t one_of(const std::vector<size_t>& choices) { return choices[upto(choices.size() - 1)]; }
  std::vector<float> normal(size_t size) {
    std::normal_distribution<float> distribution;
    std::vector<float> values(size);
    for (float& value : values) value = distribution(engine_);
    return values;
  }

 private:
  std::mt19937_64 engine_;
};

Case random_case(uint64_t seed) {
  Random random(seed);
  Case c;
  fips::Attention& s = c.shape;
  s.batch = 1 + random.upto(2);
  s.kv_heads = 1 + random.upto(2);
  s.heads = s.kv_heads * random.one_of({1, 1, 2, 3, 4, 5, 8});
  s.head_size = 16 * (1 + random.upto(8));
  const bool is_long = random.upto(9) == 0;
  s.tokens = is_long ? 1 : random.one_of({1, 1, 2, 5, 17, 40});
  s.window = random.one_of({0, 0, 1, 2, 31, 32, 33, 700});
  s.scale = 0.3f;
  s.epsilon = 1e-6f;
  size_t longest = 0;
  for (size_t text = 0; text < s.batch; ++text) {
    const size_t past = is_long ? 500 + random.upto(1200) : random.upto(90);
    longest = longest < past ? past : longest;
    c.seqlens_k.push_back(static_cast<int32_t>(past + s.tokens) - 1);
    for (size_t token = 0; token < s.tokens; ++token) c.position_ids.push_back(static_cast<int64_t>(past + token));
  }
  s.table_rows = longest + s.tokens;
  s.past_capacity = random.upto(1) ? longest : longest + s.tokens + random.upto(9);
  s.capacity = s.past_capacity < longest + s.tokens ? longest + s.tokens : s.past_capacity;
  c.qkv = random.normal(s.batch * s.tokens * (s.heads + 2 * s.kv_heads) * s.head_size);
  const size_t cache = s.batch * s.kv_heads * s.past_capacity * s.head_size;
  c.past_key = random.normal(cache);
  c.past_value = random.normal(cache);
  // What is behind a text must not matter.
  for (size_t i = 0; i < cache; ++i) {
    const size_t row = i / s.head_size, text = row / s.past_capacity / s.kv_heads;
    if (row % s.past_capacity < c.past(text)) continue;
    c.past_key[i] = c.past_value[i] = std::numeric_limits<float>::quiet_NaN();
  }
  c.cosines = random.normal(s.table_rows * s.head_size / 2);
  c.sines = random.normal(s.table_rows * s.head_size / 2);
  if (random.upto(1)) {
    c.q_norm = random.normal(s.head_size);
    c.k_norm = random.normal(s.head_size);
  }
  return c;
}

struct Outputs {
  std::vector<float> y, key, value;
};

fips::Attention pointers(const Case& c, const float* past_key, const float* past_value, Outputs& out) {
  fips::Attention a = c.shape;
  out.y.assign(a.batch * a.tokens * a.heads * a.head_size, 12345.0f);
  a.qkv = c.qkv.data();
  a.past_key = past_key;
  a.past_value = past_value;
  a.seqlens_k = c.seqlens_k.data();
  a.position_ids = c.position_ids.data();
  a.cosines = c.cosines.data();
  a.sines = c.sines.data();
  a.q_norm = c.q_norm.empty() ? nullptr : c.q_norm.data();
  a.k_norm = c.k_norm.empty() ? nullptr : c.k_norm.data();
  a.y = out.y.data();
  a.present_key = out.key.data();
  a.present_value = out.value.data();
  return a;
}

Outputs attend(const Case& c, const fips::Kernels& kernels, fips::ParallelFor parallel_for, bool in_place) {
  Outputs out;
  const size_t size = c.shape.batch * c.shape.kv_heads * c.shape.capacity * c.shape.head_size;
  if (in_place) {
    out.key = c.past_key;
    out.value = c.past_value;
    fips::cached_attention(pointers(c, out.key.data(), out.value.data(), out), kernels, parallel_for);
  } else {
    out.key.assign(size, 12345.0f);
    out.value.assign(size, 12345.0f);
    fips::cached_attention(pointers(c, c.past_key.data(), c.past_value.data(), out), kernels, parallel_for);
  }
  return out;
}

// A head of a new token: normalized and rotated.
std::vector<double> head_of(const Case& c, size_t index, size_t head, const std::vector<float>& norm) {
  const size_t size = c.shape.head_size, half = size / 2, heads = c.shape.heads + 2 * c.shape.kv_heads;
  const float* x = c.qkv.data() + (index * heads + head) * size;
  double squares = 0;
  for (size_t i = 0; i < size; ++i) squares += double{x[i]} * double{x[i]};
  const double unit = 1 / std::sqrt(squares / static_cast<double>(size) + double{c.shape.epsilon});
  const auto value = [&](size_t i) { return norm.empty() ? double{x[i]} : double{x[i]} * unit * double{norm[i]}; };
  const size_t row = static_cast<size_t>(c.position_ids[index]) * half;
  std::vector<double> result(size);
  for (size_t i = 0; i < half; ++i) {
    const double cosine = double{c.cosines[row + i]}, sine = double{c.sines[row + i]};
    result[i] = value(i) * cosine - value(half + i) * sine;
    result[half + i] = value(half + i) * cosine + value(i) * sine;
  }
  return result;
}

struct Difference {
  double worst = 0;
  void add(double actual, double expected, double unit) {
    const double found = std::fabs(actual - expected) / (kAllowed * unit);
    worst = found <= worst ? worst : found;  // NaN is larger than all
  }
};

// Caches and outputs against what they should be.
double compare(const Case& c, const Outputs& out) {
  const fips::Attention& s = c.shape;
  const size_t size = s.head_size;
  Difference difference;
  for (size_t text = 0; text < s.batch; ++text) {
    const size_t past = c.past(text);
    for (size_t kv = 0; kv < s.kv_heads; ++kv) {
      const float* keys = out.key.data() + (text * s.kv_heads + kv) * s.capacity * size;
      const float* values = out.value.data() + (text * s.kv_heads + kv) * s.capacity * size;
      const size_t before = (text * s.kv_heads + kv) * s.past_capacity * size;
      for (size_t i = 0; i < past * size; ++i) {
        if (keys[i] != c.past_key[before + i] || values[i] != c.past_value[before + i]) return HUGE_VAL;
      }
      for (size_t token = 0; token < s.tokens; ++token) {
        const size_t index = text * s.tokens + token, place = (past + token) * size;
        const std::vector<double> key = head_of(c, index, s.heads + kv, c.k_norm);
        const float* value = c.qkv.data() + (index * (s.heads + 2 * s.kv_heads) + s.heads + s.kv_heads + kv) * size;
        for (size_t i = 0; i < size; ++i) {
          difference.add(double{keys[place + i]}, key[i], 10);
          if (values[place + i] != value[i]) return HUGE_VAL;
        }
        const size_t end = past + token + 1, begin = s.window == 0 || end < s.window ? 0 : end - s.window;
        for (size_t g = 0; g < c.group(); ++g) {
          const size_t head = kv * c.group() + g;
          const std::vector<double> query = head_of(c, index, head, c.q_norm);
          std::vector<double> weights;
          double maximum = -HUGE_VAL, sum = 0;
          for (size_t j = begin; j < end; ++j) {
            double score = 0;
            for (size_t i = 0; i < size; ++i) score += query[i] * double{keys[j * size + i]};
            weights.push_back(score * double{s.scale});
            maximum = std::fmax(maximum, weights.back());
          }
          for (double& weight : weights) sum += weight = std::exp(weight - maximum);
          for (size_t i = 0; i < size; ++i) {
            double expected = 0;
            for (size_t j = begin; j < end; ++j) expected += weights[j - begin] / sum * double{values[j * size + i]};
            // Scores have float32's rounding, of hundreds here, which their exponentials multiply.
            difference.add(double{out.y[(index * s.heads + head) * size + i]}, expected, 10 + std::fabs(maximum));
          }
        }
      }
    }
  }
  return difference.worst;
}

bool is_refused(const Case& c, const fips::Kernels& kernels) {
  try {
    attend(c, kernels, {run_on_one_thread, nullptr}, false);
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

// What is wrong with a case; adds to `worst`.
std::string run(Case c, const fips::Kernels& kernels, double& worst) {
  const Outputs one = attend(c, kernels, {run_on_one_thread, nullptr}, false);
  const double difference = compare(c, one);
  worst = difference <= worst ? worst : difference;
  if (!(difference <= 1)) return "differs by " + std::to_string(difference) + " times what is allowed";
  const Outputs two = attend(c, kernels, {run_on_two_threads, nullptr}, false);
  if (one.y != two.y || one.key != two.key || one.value != two.value) return "two threads give other bits than one";
  if (c.shape.past_capacity == c.shape.capacity) {
    const Outputs own = attend(c, kernels, {run_on_two_threads, nullptr}, true);
    if (own.y != one.y || !(compare(c, own) <= 1)) return "differs in place";
  }
  const int32_t length = c.seqlens_k[0];
  const int32_t longest = static_cast<int32_t>(c.shape.past_capacity + c.shape.tokens);
  for (const int32_t wrong : {INT32_MIN, -1, static_cast<int32_t>(c.shape.tokens) - 2, longest, INT32_MAX}) {
    c.seqlens_k[0] = wrong;
    if (!is_refused(c, kernels)) return "a text of " + std::to_string(wrong) + " + 1 tokens is accepted";
  }
  c.seqlens_k[0] = length;
  Case small = c;
  small.shape.capacity = static_cast<size_t>(length);
  if (!is_refused(small, kernels)) return "a cache that is too small for its text is accepted";
  for (const int64_t wrong : {INT64_MIN, int64_t{-1}, static_cast<int64_t>(c.shape.table_rows), INT64_MAX}) {
    c.position_ids.back() = wrong;
    if (!is_refused(c, kernels)) return "position " + std::to_string(wrong) + " is accepted";
  }
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  const size_t cases = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 0;
  int failures = 0;
  for (int i = 2; i < argc; ++i) {
    const fips::Kernels* kernels = fips::find_kernels(argv[i]);
    if (!kernels) {
      std::fprintf(stderr, "attention_driver: no kernels for %s\n", argv[i]);
      return 2;
    }
    double worst = 0;
    for (size_t seed = 0; seed < cases; ++seed) {
      const std::string wrong = run(random_case(seed), *kernels, worst);
      if (wrong.empty()) continue;
      std::fprintf(stderr, "case %zu: %s, %s\n", seed, kernels->name, wrong.c_str());
      failures = 1;
    }
    std::printf("%s %zu %g\n", kernels->name, cases, worst);
  }
  return failures;
}
