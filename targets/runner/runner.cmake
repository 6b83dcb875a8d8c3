# calora_add_runner(SOURCES…): the program calora_runner, of what all runners share and of one runtime's sources.
set(CALORA_SHARED ${CMAKE_CURRENT_LIST_DIR})

function(calora_add_runner)
  # Linked into a directory of its own: with /usr/include on its path, a cross build finds this machine's C library.
  find_path(NLOHMANN_INCLUDE nlohmann/json.hpp REQUIRED)
  file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/include)
  file(CREATE_LINK ${NLOHMANN_INCLUDE}/nlohmann ${CMAKE_BINARY_DIR}/include/nlohmann SYMBOLIC)
  set(shared main answer outlet measuring job session package factors extras safetensors fields mapped_file
             machine)
  list(TRANSFORM shared PREPEND ${CALORA_SHARED}/)
  list(TRANSFORM shared APPEND .cpp)
  add_executable(calora_runner ${shared} ${ARGN})
  target_include_directories(calora_runner PRIVATE ${CALORA_SHARED})
  target_include_directories(calora_runner SYSTEM PRIVATE ${CMAKE_BINARY_DIR}/include)
endfunction()
